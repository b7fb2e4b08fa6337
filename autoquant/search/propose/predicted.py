"""What predictions hold for best: the runners-up of one fit, and refits to what was measured."""

from collections.abc import Iterator, Sequence

from autoquant.plan.assignment import Assignment
from autoquant.search.history import History
from autoquant.search.predictor import Predictor, ranked
from autoquant.search.propose.proposal import Named, Proposal, Ranking, take
from autoquant.search.surrogate import Surrogate
from autoquant.search.trials import Stage

REFIT_EVERY = 5
"""Candidates measured between two fits: as many as a fit of a few dozen can be moved by."""


class RunnersUp:
    """Proposes assignments in the order of one fit, made at the first call.

    Args:
        predictor: of the problem.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._ranking: Ranking | None = None

    def propose(self, history: History, count: int) -> Sequence[Proposal]:
        if self._ranking is None:
            self._ranking = Ranking(_ranked(self._predictor, self._predictor.fitted(history)))
        return take(self._ranking, history, count, Stage.RUNNER_UP, history.best())

    def ahead(self, history: History, count: int) -> Sequence[Assignment]:
        return () if self._ranking is None else self._ranking.ahead(history, count)


class Refits:
    """Proposes assignments in the order of a fit that learns of single options, and fits again.

    Args:
        predictor: of the problem.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._ranking = Ranking()
        self._left = 0
        """Proposals to come from the ranking."""

    def propose(self, history: History, count: int) -> Sequence[Proposal]:
        found = self._next(history, count)
        if not found:
            self._ranking = Ranking(_ranked(self._predictor, self._predictor.refitted(history)))
            self._left = REFIT_EVERY
            found = self._next(history, count)
        return found

    def _next(self, history: History, count: int) -> Sequence[Proposal]:
        count = min(count, self._left)
        found = take(self._ranking, history, count, Stage.REFIT, history.best())
        self._left -= len(found)
        return found

    def ahead(self, history: History, count: int) -> Sequence[Assignment]:
        return self._ranking.ahead(history, min(count, self._left))


def _ranked(predictor: Predictor, fitted: Surrogate) -> Iterator[Named]:
    """Yield the problem's assignments, least predicted KL first."""
    problem = predictor.problem
    for rank, selection in enumerate(ranked(fitted, problem), start=1):
        yield f"rank {rank}", problem.decode(selection), float(fitted.predict([selection])[0])
