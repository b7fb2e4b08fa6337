"""What each part of the search adds, on fresh tokens.

    python -m experiments.ablation.run --subject stories260K --seed 0 --out FILE

Solvers on equal scores, without a joint measurement; then each proposer alone and all together,
with equal numbers of joint measurements. The incumbent is replaced by the candidate of least KL on
the search tokens, so what is chosen by luck shows on the fresh ones.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from autoquant.data.tokens import Split, TokenPlan
from autoquant.search.bounds import Bounds
from autoquant.search.explore import explore
from autoquant.search.problem import Problem
from autoquant.search.refine import Effort
from autoquant.search.solver import Selection
from autoquant.search.trials import Ledger
from experiments.common import record
from experiments.common.bench import Bench
from experiments.common.subjects import add_arguments, subject

NOTHING = {"runners_up": 0, "reweight": 0, "refit": 0, "swaps": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--search-tokens", type=int, default=16_384)
    parser.add_argument("--fresh-tokens", type=int, default=65_536)
    parser.add_argument("--steps", type=int, nargs="*", default=[10, 30, 60])
    arguments = parser.parse_args()
    chosen = subject(arguments.subject, arguments.models, arguments.texts)
    tokens = TokenPlan(search=arguments.search_tokens, report=4096, seed=arguments.seed)
    bench = Bench(chosen, "default", tokens, arguments.device)
    search, fresh = bench.splits["search"], bench.fresh(arguments.fresh_tokens)
    with tempfile.TemporaryDirectory() as folder:
        sensitivity = bench.probe(search, Path(folder))
    result = record.provenance(arguments.commit) | {
        "subject": chosen.name,
        "seed": arguments.seed,
        "scope": str(chosen.scope),
        "tokens": {"search": search.tokens, "fresh": fresh.tokens},
        "rows": [],
    }
    for bpe in chosen.bpes:
        problem = bench.problem(bpe, sensitivity)
        for row in rows(bench, problem, search, fresh, arguments):
            result["rows"].append({"budget_bpe": bpe, **row})
            record.write(arguments.out, result)


def rows(
    bench: Bench, problem: Problem, search: Split, fresh: Split, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    knapsack = problem.knapsack
    for name, selection in {
        "greedy": knapsack.fill(cheapest(problem)),
        "max-threshold": threshold(problem),
        "exact": knapsack.solve(),
    }.items():
        assignment = problem.decode(selection)
        yield {
            "part": f"solver: {name}",
            "trials": 0,
            "search_kl": bench.score(assignment, search).mean,
            "fresh_kl": bench.score(assignment, fresh).mean,
            "bytes_left": knapsack.budget - knapsack.cost(selection),
        }
    for steps in arguments.steps:
        efforts = {part: Effort(**{**NOTHING, part: steps}) for part in NOTHING}
        for name, effort in {**efforts, "all": Effort.of(steps)}.items():
            ledger = explored(bench, problem, search, effort, arguments.seed)
            best = ledger.best()
            yield {
                "part": name,
                "trials": steps,
                "measured": len(ledger.trials),
                "tokens": ledger.tokens,
                "search_kl": best.kl,
                "fresh_kl": bench.score(best.assignment, fresh).mean,
            }


def explored(bench: Bench, problem: Problem, split: Split, effort: Effort, seed: int) -> Ledger:
    """Baselines, the solver's optima and `effort` beyond them."""
    ledger = Ledger(
        bench.session.scorer,
        split,
        bench.plan.accounting,
        problem.fits,
        earlier=(),
        keep=lambda _: None,
    )
    bounds = Bounds(lambda: True, None)
    explore(problem, ledger, effort, seed=seed, bounds=bounds, timed=lambda _: nullcontext())
    return ledger


def cheapest(problem: Problem) -> Selection:
    """The option of fewest bytes of each group, of those the one of least score."""
    knapsack = problem.knapsack
    return tuple(
        min(range(len(costs)), key=lambda i: (costs[i], scores[i]))
        for costs, scores in zip(knapsack.costs, knapsack.scores, strict=True)
    )


def threshold(problem: Problem) -> Selection:
    """Each group's cheapest option under the least threshold of single scores that fits."""
    knapsack = problem.knapsack
    limits = sorted({score for options in knapsack.scores for score in options})
    selections = (_under(problem, limit) for limit in limits)
    return next(s for s in selections if s is not None and knapsack.cost(s) <= knapsack.budget)


def _under(problem: Problem, limit: float) -> Selection | None:
    chosen = []
    for costs, scores in zip(problem.knapsack.costs, problem.knapsack.scores, strict=True):
        allowed = [i for i, score in enumerate(scores) if score <= limit]
        if not allowed:
            return None
        chosen.append(min(allowed, key=lambda i: (costs[i], scores[i])))
    return tuple(chosen)


if __name__ == "__main__":
    main()
