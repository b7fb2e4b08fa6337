"""Who proposes how many of the trials."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from autoquant.search.predictor import Predictor
from autoquant.search.propose.predicted import Refits, RunnersUp
from autoquant.search.propose.proposal import Proposer
from autoquant.search.propose.swaps import Swaps

MOST_RUNNERS_UP = 30
"""One optimum of the knapsack is 7 % above the best measured; the best of its 30 is the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How many new joint measurements each proposer of the refinement may have."""

    runners_up: int
    refit: int
    swaps: int

    @classmethod
    def of(cls, trials: int) -> "Effort":
        """Split a number of trials: half runners-up, and a quarter each to refits and swaps."""
        runners_up = min(MOST_RUNNERS_UP, math.ceil(trials / 2))
        swaps = (trials - runners_up) // 2
        return cls(runners_up=runners_up, refit=trials - runners_up - swaps, swaps=swaps)

    @property
    def trials(self) -> int:
        """All of them."""
        return self.runners_up + self.refit + self.swaps


def shared_out(predictor: Predictor, effort: Effort) -> Iterable[tuple[Proposer, int]]:
    """Each proposer and its share, in their order.

    The assignments of least predicted KL, with the interactions of the groups; the optima of a
    surrogate that is refitted to what was measured; swaps of one or two groups around the best.
    """
    return (
        (RunnersUp(predictor), effort.runners_up),
        (Refits(predictor), effort.refit),
        (Swaps(predictor), effort.swaps),
    )
