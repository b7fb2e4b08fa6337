"""Partial selections of a multiple-choice knapsack, group after group: the optimum, and a beam.

Shapes: L limits, G groups, P partial selections.
"""

from dataclasses import dataclass

import numpy as np

from autoquant.arrays import Booleans, Floats, Integers
from autoquant.search.relaxation import Priced, Selection

MOST_PARTIAL = 2**20
"""Partial selections that the search for the optimum may look at in one step and keep in all: some
hundred megabytes. Measured scores of hundreds of groups need tens of thousands; scores that follow
the costs need more than there is memory for."""

_BEAM_WIDTH = 2048
"""Partial selections kept at each step of the search for runners-up."""


def optimum(priced: Priced, incumbent: Selection) -> Selection | None:
    """The selection of least score within the budgets, or None where that takes too many lists.

    Lists of partial selections, group after group, without those that cost and score no less than
    another one, and without those whose bound exceeds the incumbent's score (Pisinger, A minimal
    algorithm for the multiple-choice knapsack problem, 1995). Exact; where rounding puts every
    bound above the incumbent's score, nothing is better than the incumbent.

    Args:
        priced: the knapsack.
        incumbent: a selection within the budgets, the better the faster.
    """
    scores, costs = priced.tables.scores, priced.tables.costs
    gap = scores[np.arange(len(scores)), incumbent].sum() - priced.bound + priced.rounding
    excess = priced.excess
    # Groups whose alternatives are out of the question first: they make no lists.
    second = min(1, excess.shape[1] - 1)
    order = np.argsort(-np.partition(excess, second, axis=1)[:, second], kind="stable")
    lists = _Lists(np.zeros(1), np.zeros(1), np.zeros((len(costs), 1), dtype=np.int64))
    dearest = _after(costs.max(axis=2)[:, order])
    steps, kept = [], 0
    for step, group in enumerate(order):
        live = np.flatnonzero(excess[group] <= gap)
        if kept + len(lists.score) * len(live) > MOST_PARTIAL:
            return None
        lists, places = lists.extended(
            scores[group, live], costs[:, group, live], excess[group, live]
        ).kept(priced, gap, dearest[:, step])
        if not len(places):
            return incumbent
        steps.append((places.astype(np.int32), live))
        kept += len(places)
    chosen = np.empty(len(order), dtype=np.int64)
    row = int(lists.score.argmin())
    for group, (rows, live) in zip(order[::-1], reversed(steps), strict=True):
        row, option = divmod(int(rows[row]), len(live))
        chosen[group] = live[option]
    return tuple(chosen.tolist())


@dataclass(frozen=True)
class _Lists:
    """Partial selections."""

    score: Floats
    """[P]."""
    excess: Floats
    """[P]."""
    costs: Integers
    """[L, P]."""

    def extended(self, scores: Floats, costs: Integers, excess: Floats) -> "_Lists":
        """Each with each option of one more group, the option varying fastest."""
        return _Lists(
            (self.score[:, None] + scores).ravel(),
            (self.excess[:, None] + excess).ravel(),
            (self.costs[:, :, None] + costs[:, None, :]).reshape(len(costs), -1),
        )

    def kept(self, priced: Priced, gap: float, dearest: Integers) -> tuple["_Lists", Integers]:
        """Those that may lead to the optimum, and their places.

        Args:
            priced: the knapsack.
            gap: what the bound may rise by.
            dearest: what the groups to come take at most, [L]; what is left then counts against
                the bound.
        """
        left = priced.spare[:, None] - self.costs
        bound = self.excess
        for multiplier, own, most in zip(priced.multipliers, left, dearest, strict=True):
            bound = bound + multiplier * np.maximum(own - most, 0)
        may = np.flatnonzero((left >= 0).all(axis=0) & (bound <= gap))
        may = may[np.lexsort((self.score[may], *self.costs[::-1, may]))]
        places = may[_undominated(self.score[may], self.costs[1:, may])]
        return _Lists(self.score[places], self.excess[places], self.costs[:, places]), places


def _undominated(scores: Floats, costs: Integers) -> Booleans:
    """Which rows score less than every row before them that costs no more, [P].

    Args:
        scores: [P].
        costs: of the limits that the rows are not sorted by, [L - 1, P].
    """
    if not len(costs):
        least = np.minimum.accumulate(scores)
        return np.asarray(np.diff(least, prepend=np.inf) < 0)
    # Of two halves that follow each other, the first may dominate the second; then double them.
    size = 1 << max(1, (len(scores) - 1).bit_length())
    score, cost = np.full(size, np.inf), np.full(size, np.iinfo(np.int64).max)
    score[: len(scores)], cost[: len(scores)] = scores, costs[0]
    least = np.full(size, np.inf)
    width = 1
    while width < size:
        order = cost.reshape(-1, 2 * width).argsort(axis=1, kind="stable")
        firsts = np.take_along_axis(score.reshape(-1, 2 * width), order, axis=1)
        firsts = np.minimum.accumulate(np.where(order < width, firsts, np.inf), axis=1)
        found = np.empty_like(firsts)
        np.put_along_axis(found, order, firsts, axis=1)
        half = least.reshape(-1, 2 * width)[:, width:]
        np.minimum(half, found[:, width:], out=half)
        width *= 2
    return np.asarray(scores < least[: len(scores)])


def _after(values: Integers) -> Integers:
    """Sum of what comes behind each place, [L, G]."""
    return np.asarray(values[:, ::-1].cumsum(axis=1)[:, ::-1] - values)


def beam(priced: Priced) -> Integers:
    """Selections of low bound within the budgets, [P, G], P at most `_BEAM_WIDTH`, may be none."""
    tables, excess_of = priced.tables, priced.excess
    spare = priced.spare[:, None]
    excess, costs = np.zeros(1), np.zeros((len(spare), 1), dtype=np.int64)
    steps = []
    for g in range(len(excess_of)):
        options = np.flatnonzero(tables.is_option[g])
        excess = (excess[:, None] + excess_of[g, options]).ravel()
        costs = (costs[:, :, None] + tables.costs[:, g][:, None, options]).reshape(len(spare), -1)
        keep = np.flatnonzero((costs <= spare).all(axis=0))
        if len(keep) > _BEAM_WIDTH:
            # Of partial selections with one bound, the costlier has the lower score.
            taken = (costs[:, keep] / np.maximum(spare, 1)).sum(axis=0)
            rank = np.round(excess[keep], 12) - 1e-13 * taken
            keep = keep[np.argpartition(rank, _BEAM_WIDTH)[:_BEAM_WIDTH]]
        excess, costs = excess[keep], costs[:, keep]
        steps.append((keep // len(options), options[keep % len(options)]))
    rows = np.arange(len(excess))
    columns = []
    for parents, choices in reversed(steps):
        columns.append(choices[rows])
        rows = parents[rows]
    return np.stack(columns[::-1], axis=1)
