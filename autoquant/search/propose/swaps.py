"""Assignments that differ from one in a group or two, refilled to the budget."""

from collections.abc import Iterator, Sequence

import numpy as np

from autoquant.arrays import Floats
from autoquant.plan.assignment import Assignment
from autoquant.search.history import History
from autoquant.search.knapsack import Knapsack
from autoquant.search.predictor import Options, Predictor
from autoquant.search.propose.proposal import Named, Proposal, Ranking, take
from autoquant.search.relaxation import Selection
from autoquant.search.surrogate import Surrogate
from autoquant.search.trials import Stage, Trial

PAIRS = 200
"""Changes of two groups that are looked at, in order of predicted KL."""


class Swaps:
    """Proposes the neighbours of the best, and those of a better one as soon as there is one.

    The best of all may use a scale rule that the joint check has closed since; the walk begins at
    the best that does not. What stays is worse than it: so neighbours race against it.

    Args:
        predictor: of the problem.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._centre: Trial | None = None
        self._neighbours = Ranking()

    def propose(self, history: History, count: int) -> Sequence[Proposal]:
        allowed = [t for t in history.eligible() if self._predictor.selection(t) is not None]
        centre = min(allowed, key=lambda trial: trial.order, default=None)
        if centre is None:
            return ()
        if centre is not self._centre:
            fitted = self._predictor.refitted(history)
            selection = self._predictor.selection(centre)
            assert selection is not None
            self._centre = centre
            self._neighbours = Ranking(neighbours(self._predictor.problem, fitted, selection))
        return take(self._neighbours, history, count, Stage.SWAP, centre)

    def ahead(self, history: History, count: int) -> Sequence[Assignment]:
        return self._neighbours.ahead(history, count)


def neighbours(problem: Options, surrogate: Surrogate, selection: Selection) -> Iterator[Named]:
    """Yield what was changed and the assignment, least predicted KL first.

    A change of one group lets others give way until the budget holds; a change of two is taken as
    it is where it fits. Either way what is left is spent on upgrades.
    """
    knapsack = problem.knapsack
    found: dict[Selection, str] = {}
    for g, sizes in enumerate(knapsack.costs):
        for option in range(len(sizes)):
            changed = knapsack.around(selection, g, option) if option != selection[g] else None
            if changed is not None and changed != selection:
                found.setdefault(changed, _name(problem, (g, option)))
    for one, other in _pairs(knapsack, surrogate, selection):
        chosen = [*selection]
        for g, option in (one, other):
            chosen[g] = option
        changed = knapsack.fill(tuple(chosen))
        if changed != selection:
            found.setdefault(changed, _name(problem, one, other))
    order = list(found)
    predicted = surrogate.predict(order) if order else np.empty(0)
    for i in np.argsort(predicted, kind="stable"):
        yield found[order[i]], problem.decode(order[i]), float(predicted[i])


Change = tuple[int, int]
"""Group and its new option."""


def _pairs(
    knapsack: Knapsack, surrogate: Surrogate, selection: Selection
) -> Iterator[tuple[Change, Change]]:
    """Yield the changes of two groups that fit the budget and are predicted to cost least."""
    changes = [
        (g, option)
        for g, sizes in enumerate(knapsack.costs)
        for option in range(len(sizes))
        if option != selection[g]
    ]
    marginal = surrogate.marginal(selection)
    score = np.array([marginal[g][o] - marginal[g][selection[g]] for g, o in changes])
    group = np.array([g for g, _ in changes])
    total: Floats = score[:, None] + score[None, :]
    is_legal = group[:, None] < group[None, :]
    for one in knapsack.constraints:
        extra = np.array([one.costs[g][o] - one.costs[g][selection[g]] for g, o in changes])
        is_legal &= extra[:, None] + extra[None, :] <= one.budget - one.cost(selection)
    total[~is_legal] = np.inf
    count = min(PAIRS, int(is_legal.sum()))
    for place in np.argsort(total, axis=None, kind="stable")[:count]:
        i, j = divmod(int(place), len(changes))
        yield changes[i], changes[j]


def _name(problem: Options, *changes: Change) -> str:
    return ", ".join(problem.label(g, option) for g, option in changes)
