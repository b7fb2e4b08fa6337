"""Write what a finished run and its tasks say as one file of results.

    python -m experiments.evidence.collect runs/smollm2-5.0 --out experiments/evidence/results/FILE

The items' own scores stay in the run directory; the paired differences are made from them.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autoquant.report.record import RunRecord
from autoquant.store.run_directory import EVALUATION, read_json
from experiments.common import record

KEPT = ("budget_bpe", "budget_scope", "bpe", "checkpoint_bytes", "target", "kl", "noise_floor")


def collected(run: RunRecord, commit: str | None) -> dict[str, Any]:
    """Figures of a run, its tasks, and what they were measured with.

    Raises:
        SystemExit: the run is not finished, or no task was run on it.
    """
    result, stored = run.result, read_json(run.path, EVALUATION)
    if result is None or run.evaluation is None or stored is None:
        raise SystemExit(f"{run.path} has no result, or no tasks were run on it")
    own = {name: result[name] for name in KEPT}
    return record.provenance(commit) | {
        "kind": "tasks",
        "subject": Path(result["model"]).name,
        "settings": {name: _portable(value) for name, value in run.settings.items()},
        **own,
        "seconds": result["seconds"],
        "counts": result["counts"],
        "tokens": {name: split["tokens"] for name, split in result["tokens"].items()},
        "baselines": result["baselines"],
        "by_position": [
            {"name": row["name"], "buckets": row["buckets"]}
            for row in result.get("by_position", ())
        ],
        "tasks": {
            "names": [Path(name).name for name in stored["tasks"]],
            "limit": stored["limit"],
            "chat_template": stored["chat_template"],
            "seconds": stored["seconds"],
            "versions": stored["versions"],
            "device": stored["device"],
            "candidates": [asdict(candidate) for candidate in run.evaluation.candidates],
            "rows": _longest(run.evaluation.table()),
        },
    }


def _longest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each task the rows on the most items: earlier calls may have taken fewer."""
    most: dict[str, int] = {}
    for row in rows:
        most[row["task"]] = max(most.get(row["task"], 0), row["items"])
    return [row for row in rows if row["items"] == most[row["task"]]]


def _portable(value: Any) -> Any:
    """A path without the folders of this machine."""
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_path else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default=None, help="of the code, where git cannot tell")
    arguments = parser.parse_args()
    record.write(arguments.out, collected(RunRecord.read(arguments.run), arguments.commit))
    print(arguments.out)


if __name__ == "__main__":
    main()
