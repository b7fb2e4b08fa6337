"""The solver's optima of a problem."""

from collections.abc import Iterator

from autoquant.formats import ScaleRule
from autoquant.search.problem import Problem
from autoquant.search.propose.proposal import Named


def optima(problem: Problem) -> Iterator[Named]:
    """Yield the optimum, that of the gradients' estimates, and that of the scale rule `max` alone,
    as far as the problem has them.
    """
    yield "optimum", problem.optimum()
    by_gradients = problem.by_gradients()
    if by_gradients is not None:
        yield "optimum of the gradients", by_gradients.optimum()
    max_only = problem.restricted(ScaleRule.MAX)
    if max_only is not None:
        yield "optimum, rule max only", problem.decode(max_only.solve())
