"""What the search's own sampler and Optuna's reach with the same tokens, on fresh ones.

    python -m experiments.ablation.samplers --subject stories260K --seed 0 --out FILE

Each sampler proposes after the same probes, recipes, optima and check of the rules, races the same
way, and is read off where all that was measured takes as many tokens as so many plain forwards of
the search split. What two samplers ask for alike is measured once and counted for both. The file is
written after each sampler; the same command goes on with those that it lacks.
"""

import argparse
import json
from typing import Any

from autoquant.data.tokens import TokenPlan
from autoquant.search.samplers import OPTUNA_SAMPLERS, OWN_SAMPLER
from experiments.ablation.run import proposed
from experiments.common import record
from experiments.common.bench import Bench
from experiments.common.subjects import add_arguments, subject

SAMPLERS = (OWN_SAMPLER, *OPTUNA_SAMPLERS)


def main() -> None:
    arguments = parsed()
    result = opened(arguments)
    left = [
        (bpe, name)
        for bpe in result["budgets"]
        for name in arguments.samplers
        if not any((row["bpe"], row["part"]) == (bpe, name) for row in result["rows"])
    ]
    if not left:
        return
    chosen = subject(arguments.subject, arguments.models, arguments.texts)
    bench = Bench(chosen, "default", TokenPlan(**result["plan"]), arguments.device)
    splits = bench.splits["search"], bench.splits["report"], bench.fresh(arguments.fresh_tokens)
    result["tokens"] = {split.name: split.tokens for split in splits}
    problems = {bpe: bench.problem(bpe, bench.probe()) for bpe in dict.fromkeys(b for b, _ in left)}
    for bpe, name in left:
        problem = problems[bpe]
        if not any((row["bpe"], row["part"]) == (bpe, "optimum") for row in result["rows"]):
            optimum = {
                "part": "optimum",
                "search_kl": bench.score(problem.optimum(), splits[0]).mean,
                "fresh_kl": bench.score(problem.optimum(), splits[2]).mean,
            }
            result["rows"].append({"bpe": bpe, **optimum})
        part = {name: {"sampler": name}}
        rows = [*proposed(bench, problem, part, splits, arguments)]
        result["rows"] += [{"bpe": bpe, **row} for row in rows]
        record.write(arguments.out, result)


def parsed() -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    tokens = TokenPlan()
    parser.add_argument("--calibration-tokens", type=int, default=tokens.calibration)
    parser.add_argument("--search-tokens", type=int, default=tokens.search)
    parser.add_argument("--report-tokens", type=int, default=32_768)
    parser.add_argument("--fresh-tokens", type=int, default=32_768)
    parser.add_argument("--sequence-length", type=int, default=tokens.sequence_length)
    parser.add_argument("--batch-tokens", type=int, default=tokens.batch_tokens)
    parser.add_argument("--budgets", type=float, nargs="*", help="instead of the subject's")
    parser.add_argument("--forwards", type=int, nargs="*", default=[30])
    parser.add_argument("--samplers", nargs="*", default=SAMPLERS)
    return parser.parse_args()


def opened(arguments: argparse.Namespace) -> dict[str, Any]:
    """The file of an earlier call with the same settings, or a new one."""
    chosen = subject(arguments.subject, arguments.models, arguments.texts)
    settings = {
        "subject": chosen.name,
        "seed": arguments.seed,
        "budgets": list(arguments.budgets or chosen.bpes),
        "forwards": arguments.forwards,
        "fresh_tokens": arguments.fresh_tokens,
        "plan": {
            "calibration": arguments.calibration_tokens,
            "search": arguments.search_tokens,
            "report": arguments.report_tokens,
            "sequence_length": arguments.sequence_length,
            "batch_tokens": arguments.batch_tokens,
            "seed": arguments.seed,
        },
    }
    if not arguments.out.exists():
        return record.provenance(arguments.commit) | settings | {"rows": []}
    found: dict[str, Any] = json.loads(arguments.out.read_text())
    if any(found.get(name) != value for name, value in settings.items()):
        raise SystemExit(f"{arguments.out} has other settings; name another file.")
    return found


if __name__ == "__main__":
    main()
