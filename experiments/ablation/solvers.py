"""Ways to get from sensitivities to an assignment without a joint measurement."""

from collections.abc import Callable

from autoquant.search.problem import Problem
from autoquant.search.relaxation import Selection


def greedy(problem: Problem) -> Selection:
    """From the cheapest option of each group up, best gain per byte first."""
    knapsack = problem.knapsack
    return knapsack.fill(
        tuple(
            min(range(len(costs)), key=lambda i: (costs[i], scores[i]))
            for costs, scores in zip(knapsack.costs, knapsack.scores, strict=True)
        )
    )


def threshold(problem: Problem) -> Selection:
    """Each group's cheapest option under the least threshold of single scores that fits."""
    knapsack = problem.knapsack
    limits = sorted({score for options in knapsack.scores for score in options})
    selections = (_under(problem, limit) for limit in limits)
    return next(s for s in selections if s is not None and knapsack.cost(s) <= knapsack.budget)


def exact(problem: Problem) -> Selection:
    """The knapsack's optimum."""
    return problem.knapsack.solve()


def _under(problem: Problem, limit: float) -> Selection | None:
    chosen = []
    for costs, scores in zip(problem.knapsack.costs, problem.knapsack.scores, strict=True):
        allowed = [i for i, score in enumerate(scores) if score <= limit]
        if not allowed:
            return None
        chosen.append(min(allowed, key=lambda i: (costs[i], scores[i])))
    return tuple(chosen)


SOLVERS: dict[str, Callable[[Problem], Selection]] = {
    "max-threshold": threshold,
    "greedy": greedy,
    "exact": exact,
}
"""The first is what ModelOpt's `kl_div` does with its scores."""
