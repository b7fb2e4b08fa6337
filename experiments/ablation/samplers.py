"""What the search's own sampler and Optuna's reach with the same tokens, on fresh ones.

    python -m experiments.ablation.samplers --subject stories260K --seed 0 --out FILE

Each sampler proposes after the same probes, recipes, optima and check of the rules, races the same
way, and is read off where all that was measured takes as many tokens as so many plain forwards of
the search split.
"""

import argparse
from typing import Any

from autoquant.data.tokens import TokenPlan
from experiments.ablation.run import proposed
from experiments.common import record
from experiments.common.bench import Bench
from experiments.common.subjects import add_arguments, subject

SAMPLERS = ("budget", "tpe", "nsgaii", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--fresh-tokens", type=int, default=32_768)
    parser.add_argument("--budgets", type=float, nargs="*", help="instead of the subject's")
    parser.add_argument("--forwards", type=int, nargs="*", default=[15, 30])
    parser.add_argument("--samplers", nargs="*", default=SAMPLERS)
    arguments = parser.parse_args()
    chosen = subject(arguments.subject, arguments.models, arguments.texts)
    bench = Bench(
        chosen, "default", TokenPlan(report=32_768, seed=arguments.seed), arguments.device
    )
    splits = bench.splits["search"], bench.splits["report"], bench.fresh(arguments.fresh_tokens)
    sensitivity = bench.probe()
    parts: dict[str, dict[str, Any]] = {name: {"sampler": name} for name in arguments.samplers}
    rows = []
    for bpe in arguments.budgets or chosen.bpes:
        problem = bench.problem(bpe, sensitivity)
        optimum = problem.optimum()
        base = {
            "part": "optimum",
            "search_kl": bench.score(optimum, splits[0]).mean,
            "fresh_kl": bench.score(optimum, splits[2]).mean,
        }
        rows += [
            {"bpe": bpe, **row}
            for row in (base, *proposed(bench, problem, parts, splits, arguments))
        ]
    result = record.provenance(arguments.commit) | {
        "subject": chosen.name,
        "seed": arguments.seed,
        "tokens": {split.name: split.tokens for split in splits},
        "rows": rows,
    }
    record.write(arguments.out, result)


if __name__ == "__main__":
    main()
