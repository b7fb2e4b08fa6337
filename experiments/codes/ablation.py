"""What each part adds to a search at equal bytes, alone and together.

    python -m experiments.codes.ablation MODEL --budget 5.0 --text TEXT --out RESULT.json

Every cell is a search of its own: KL of its winner on the report tokens, which are the same in all
cells, in nats per token, standard errors over documents. The rows are written again after each.
"""

import argparse
import tempfile
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import autoquant
from autoquant.data.tokens import TokenPlan
from autoquant.plan.space_file import shipped_text
from experiments.common import record
from experiments.common.processes import in_processes
from experiments.common.subjects import add_token_arguments

PLAIN = "[max, mse, four_over_six]"
EVERY = "[max, mse, four_over_six, diagonal, hessian]"

CELLS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "plain codes": (f"scale_rules: {PLAIN}", {}),
    "scales weighted by inputs": (f"scale_rules: {EVERY}", {}),
    "compensated rounding": (f"scale_rules: {PLAIN}\nroundings: [nearest, gptq]", {}),
    "polish": (f"scale_rules: {PLAIN}", {"effort": "max"}),
    "a tenth with BF16 inputs": (f"scale_rules: {PLAIN}", {"a16_share": 0.1}),
    "headroom": (f"scale_rules: {PLAIN}", {"input_headroom": 2.0}),
    "--effort default": (None, {"effort": "default", "input_headroom": 2.0}),
    "--effort max": (None, {"effort": "max", "input_headroom": 2.0}),
    "all": (None, {"effort": "max", "a16_share": 0.1, "input_headroom": 2.0}),
}
"""What the default space means by `nvfp4`, None for what the effort says, and settings."""


def main() -> None:
    arguments = _arguments()
    result = {"settings": record.settings(arguments)} | record.provenance(arguments.commit)
    rows: dict[str, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        in_processes(arguments.processes) as pool,
    ):
        places = {name: Path(folder) / str(number) for number, name in enumerate(CELLS)}
        tasks = [pool.submit(_cell, name, arguments, place) for name, place in places.items()]
        for task in as_completed(tasks):
            row = task.result()
            rows[row["cell"]] = row
            ordered = [rows[name] for name in CELLS if name in rows]
            record.write(arguments.out, result | {"rows": ordered})


def _cell(name: str, arguments: argparse.Namespace, run: Path) -> dict[str, Any]:
    """The search of one cell."""
    ways, settings = CELLS[name]
    space = "default"
    if ways is not None:
        file = run.with_suffix(".yaml")
        file.write_text(f"{shipped_text('default')}\n{ways}\n")
        space = str(file)
    found = autoquant.search(
        arguments.model,
        budget_bpe=arguments.budget,
        budget_scope="searched",
        calibration=arguments.text,
        calibration_tokens=arguments.calibration_tokens,
        search_tokens=arguments.search_tokens,
        report_tokens=arguments.report_tokens,
        sequence_length=arguments.sequence_length,
        batch_tokens=arguments.batch_tokens,
        trials=arguments.trials,
        device=arguments.device,
        export=False,
        mlflow=False,
        out=run,
        **({"input_headroom": 1.0, "space": space} | settings),
    )
    result = found.result
    assert result is not None
    row = {
        "cell": name,
        "kl": result["kl"]["mean"],
        "stderr": result["kl"]["stderr"],
        "clipped": result["inputs"]["clipped"],
        "seconds": result["seconds"]["total"],
        "polish": result["polish"],
    }
    print(row, flush=True)
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--budget", type=float, default=5.0)
    parser.add_argument("--trials", type=int, default=30)
    plan = TokenPlan()
    add_token_arguments(parser)
    parser.add_argument("--batch-tokens", type=int, default=plan.batch_tokens)
    parser.add_argument("--sequence-length", type=int, default=plan.sequence_length)
    parser.add_argument("--device")
    parser.add_argument("--processes", type=int, default=1, help="searches at a time")
    parser.add_argument("--commit", help="of the code, where there is no repository")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
