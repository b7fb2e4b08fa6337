"""What each part of the search adds, on fresh tokens.

    python -m experiments.ablation.run --subject stories260K --seed 0 --out FILE

Probes: what the knapsack makes of each kind of sensitivity, and how each ranks random assignments.
Solvers on the default probes, without a joint measurement. Proposers, from those probes: each
alone and all together, read off where together they have measured as many tokens as so many plain
forwards of the search split. The candidate of least KL on the search tokens is taken, so what is
chosen by luck shows on the fresh ones; the last rows pass through the confirmation that a search
ends with.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from autoquant.data.tokens import Split, TokenPlan
from autoquant.measure.sensitivity import Sensitivity
from autoquant.search.confirm import choose
from autoquant.search.history import History
from autoquant.search.problem import Problem
from autoquant.search.propose.shares import Effort
from autoquant.search.trials import Trial
from autoquant.study.explore import Explored
from experiments.ablation.probes import ranking, sensitivities
from experiments.ablation.solvers import SOLVERS
from experiments.common import record
from experiments.common.bench import Bench
from experiments.common.subjects import add_arguments, subject

NOTHING = {"runners_up": 0, "refit": 0, "swaps": 0}
FINALISTS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--search-tokens", type=int, default=TokenPlan().search)
    parser.add_argument("--fresh-tokens", type=int, default=32_768)
    parser.add_argument("--budgets", type=float, nargs="*", help="instead of the subject's")
    parser.add_argument("--forwards", type=int, nargs="*", default=[15, 30])
    parser.add_argument("--random", type=int, default=50, help="assignments that probes rank")
    arguments = parser.parse_args()
    chosen = subject(arguments.subject, arguments.models, arguments.texts)
    tokens = TokenPlan(search=arguments.search_tokens, report=32_768, seed=arguments.seed)
    bench = Bench(chosen, "default", tokens, arguments.device)
    splits = bench.splits["search"], bench.splits["report"], bench.fresh(arguments.fresh_tokens)
    found = sensitivities(bench)
    result = record.provenance(arguments.commit) | {
        "subject": chosen.name,
        "seed": arguments.seed,
        "scope": str(chosen.scope),
        "tokens": {split.name: split.tokens for split in splits},
        "rows": [],
    }
    for bpe in arguments.budgets or chosen.bpes:
        for row in rows(bench, bpe, found, splits, arguments):
            result["rows"].append({"budget_bpe": bpe, **row})
            record.write(arguments.out, result)


def rows(
    bench: Bench,
    bpe: float,
    found: dict[str, Sensitivity],
    splits: tuple[Split, Split, Split],
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    search, _, fresh = splits
    problems = {name: bench.problem(bpe, sensitivity) for name, sensitivity in found.items()}
    ranked = ranking(bench, problems, search, arguments)
    for name, problem in problems.items():
        assignment = problem.optimum()
        yield {
            "part": f"probes: {name}",
            "search_kl": bench.score(assignment, search).mean,
            "fresh_kl": bench.score(assignment, fresh).mean,
            **ranked[name],
        }
    problem = problems["screened"]
    for name, solver in SOLVERS.items():
        selection = solver(problem)
        assignment = problem.decode(selection)
        yield {
            "part": f"solver: {name}",
            "search_kl": bench.score(assignment, search).mean,
            "fresh_kl": bench.score(assignment, fresh).mean,
            "bytes_left": problem.knapsack.budget - problem.knapsack.cost(selection),
        }
    most = max(arguments.forwards)
    parts: dict[str, dict[str, Any]] = {
        part: {"effort": Effort(**{**NOTHING, part: 2 * most})} for part in NOTHING
    }
    parts["all"] = {"effort": Effort.of(most)}
    yield from proposed(bench, problem, parts, splits, arguments)


def proposed(
    bench: Bench,
    problem: Problem,
    parts: dict[str, dict[str, Any]],
    splits: tuple[Split, Split, Split],
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """The rows of proposers or samplers that have the same tokens.

    Args:
        bench: of the model.
        problem: what is searched.
        parts: what `Bench.explore` is given beside the problem, by name.
        splits: search, report and fresh tokens.
        arguments: with `forwards` and `seed`.
    """
    search, report, fresh = splits
    most = max(arguments.forwards)
    for name, settings in parts.items():
        history, explored = bench.explore(
            problem, 2 * most, max_tokens=most * search.tokens, **settings
        )
        for forwards in arguments.forwards:
            best = best_within(history, forwards * search.tokens)
            yield {
                "part": name,
                "forwards": forwards,
                "measured": len(history.trials),
                "search_kl": best.kl,
                "fresh_kl": bench.score(best.assignment, fresh).mean,
            }
        confirmed = confirmed_of(bench, explored, report, arguments.seed)
        yield {
            "part": f"{name}, confirmed",
            "forwards": most,
            "search_kl": confirmed.kl,
            "fresh_kl": bench.score(confirmed.assignment, fresh).mean,
        }


def best_within(history: History, tokens: int) -> Trial:
    """The best candidate of those that the first `tokens` tokens were spent on.

    The solver's optimum and the baselines count too; what they exceed `tokens` by is theirs.
    """
    best, spent = None, 0
    for trial in history.trials:
        if best is not None and spent >= tokens:
            break
        spent += trial.tokens
        if trial.is_eligible and (best is None or trial.kl < best.kl):
            best = trial
    assert best is not None
    return best


def confirmed_of(bench: Bench, explored: Explored, report: Split, seed: int) -> Trial:
    """What the confirmation on report tokens leaves."""
    finalists = [explored.incumbent, *explored.challengers[:FINALISTS]]
    scores = [bench.score(trial.assignment, report) for trial in finalists]
    winner, _ = choose(scores, challengers=len(finalists) - 1, seed=seed)
    return finalists[winner]


if __name__ == "__main__":
    main()
