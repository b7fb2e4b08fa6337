"""Selections of a multiple-choice knapsack by their Lagrangian bound.

For a multiplier m >= 0, sum_g min_i (score + m * cost) - m * budget is at most the optimum
(Fisher, The Lagrangian relaxation method, 1981). It splits over groups: an option adds to the bound
of a partial selection what it is worse than its group's best priced option, its excess.

Shapes: G groups, F options of the group that has most, P partial selections.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoquant.arrays import Booleans, Floats, Integers

Selection = tuple[int, ...]
"""Index of the chosen option of each group."""

_BEAM_WIDTH = 2048
"""Partial selections kept at each step of the search for runners-up."""
_DEAREST_BYTE = 3.0
"""A multiplier at which every group's cheapest option is priced best: normalized scores differ by
two at most, and costs by a byte at least."""
_ROUNDING = 1e-12
"""Of sums of scores, relative to the largest score times the number of groups."""


@dataclass(frozen=True)
class Tables:
    """Options as arrays; groups with fewer than F are padded with infinite scores."""

    scores: Floats
    """[G, F]."""
    costs: Integers
    """Bytes, [G, F]; zero where there is no option."""

    @classmethod
    def of(cls, scores: Sequence[Sequence[float]], costs: Sequence[Sequence[int]]) -> "Tables":
        shape = len(scores), max(map(len, scores))
        padded_scores, padded_costs = np.full(shape, np.inf), np.zeros(shape, dtype=np.int64)
        for g, (own_scores, own_costs) in enumerate(zip(scores, costs, strict=True)):
            padded_scores[g, : len(own_scores)] = own_scores
            padded_costs[g, : len(own_costs)] = own_costs
        return cls(padded_scores, padded_costs)

    @property
    def is_option(self) -> Booleans:
        """[G, F]."""
        return np.isfinite(self.scores)

    @property
    def cheapest(self) -> Integers:
        """Bytes of each group's cheapest option, [G]."""
        most = np.iinfo(np.int64).max
        return np.asarray(np.where(self.is_option, self.costs, most).min(axis=1))

    def normalized(self) -> "Tables":
        """The largest score at one, whatever the unit; bytes beyond each group's cheapest option,
        so that sums of both are of a size.
        """
        largest = np.abs(self.scores[self.is_option]).max()
        return Tables(
            self.scores / max(largest, np.finfo(np.float64).tiny),
            np.where(self.is_option, self.costs - self.cheapest[:, None], 0),
        )


@dataclass(frozen=True)
class Priced:
    """A knapsack at the multiplier of its highest bound."""

    tables: Tables
    """Normalized."""
    spare: int
    """Bytes of the budget beyond the cheapest selection."""
    multiplier: float
    """Score per byte."""

    @classmethod
    def best(cls, tables: Tables, budget: int) -> "Priced":
        """By bisection on the cost of the priced optimum."""
        spare, tables = budget - int(tables.cheapest.sum()), tables.normalized()
        low, high = 0.0, _DEAREST_BYTE
        for _ in range(100):
            middle = (low + high) / 2
            found = cls(tables, spare, middle)
            cost = np.take_along_axis(tables.costs, found.options[:, None], axis=1).sum()
            low, high = (middle, high) if cost > spare else (low, middle)
        return cls(tables, spare, high)

    @property
    def prices(self) -> Floats:
        """[G, F]."""
        return np.asarray(self.tables.scores + self.multiplier * self.tables.costs)

    @property
    def options(self) -> Integers:
        """Each group's option of least price, [G]: within the budget."""
        return np.asarray(self.prices.argmin(axis=1))

    @property
    def excess(self) -> Floats:
        """[G, F]; infinite where there is no option."""
        prices = self.prices
        return np.asarray(prices - prices.min(axis=1, keepdims=True))


def optimum(priced: Priced, incumbent: Selection) -> Selection:
    """The selection of least score within the budget.

    Lists of partial selections, group after group, without those that cost and score no less than
    another one, and without those whose bound exceeds the incumbent's score (Pisinger, A minimal
    algorithm for the multiple-choice knapsack problem, 1995). Exact; where rounding puts every
    bound above the incumbent's score, nothing is better than the incumbent.

    Args:
        priced: the knapsack.
        incumbent: a selection within the budget, the better the faster.
    """
    scores, costs, spare = priced.tables.scores, priced.tables.costs, priced.spare
    price_of_spare = priced.multiplier * spare
    bound = priced.prices.min(axis=1).sum() - price_of_spare
    gap = scores[np.arange(len(costs)), incumbent].sum() - bound
    gap += _ROUNDING * (len(costs) + price_of_spare)
    excess = priced.excess
    # Groups whose alternatives are out of the question first: they make no lists.
    second = min(1, excess.shape[1] - 1)
    order = np.argsort(-np.partition(excess, second, axis=1)[:, second], kind="stable")
    lists = _Lists(np.zeros(1), np.zeros(1), np.zeros(1, dtype=np.int64))
    steps = []
    for group, dearest in zip(order, _after(costs.max(axis=1)[order]), strict=True):
        live = np.flatnonzero(excess[group] <= gap)
        lists, places = lists.extended(
            scores[group, live], costs[group, live], excess[group, live]
        ).kept(spare, gap, priced.multiplier, dearest)
        if not len(places):
            return incumbent
        steps.append((places // len(live), live[places % len(live)]))
    chosen = np.empty(len(order), dtype=np.int64)
    row = int(lists.score.argmin())
    for group, (parents, options) in zip(order[::-1], reversed(steps), strict=True):
        chosen[group] = options[row]
        row = parents[row]
    return tuple(chosen.tolist())


@dataclass(frozen=True)
class _Lists:
    """Partial selections."""

    score: Floats
    """[P]."""
    excess: Floats
    """[P]."""
    cost: Integers
    """[P]."""

    def extended(self, scores: Floats, costs: Integers, excess: Floats) -> "_Lists":
        """Each with each option of one more group, the option varying fastest."""
        return _Lists(
            (self.score[:, None] + scores).ravel(),
            (self.excess[:, None] + excess).ravel(),
            (self.cost[:, None] + costs).ravel(),
        )

    def kept(
        self, spare: int, gap: float, multiplier: float, dearest: int
    ) -> tuple["_Lists", Integers]:
        """Those that may lead to the optimum, and their places.

        Args:
            spare: bytes beyond the cheapest selection.
            gap: what the bound may rise by.
            multiplier: score per byte.
            dearest: bytes that the groups to come take at most; what is left then counts against
                the bound.
        """
        left = spare - self.cost
        bound = self.excess + multiplier * np.maximum(left - dearest, 0)
        may = np.flatnonzero((left >= 0) & (bound <= gap))
        may = may[np.lexsort((self.score[may], self.cost[may]))]
        least = np.minimum.accumulate(self.score[may])
        places = may[np.diff(least, prepend=np.inf) < 0]
        return _Lists(self.score[places], self.excess[places], self.cost[places]), places


def _after(values: Integers) -> Integers:
    """Sum of what comes behind each place."""
    return np.asarray(values[::-1].cumsum()[::-1] - values)


def beam(priced: Priced) -> Integers:
    """Selections of low bound within the budget, [P, G], P at most `_BEAM_WIDTH`."""
    tables, excess_of = priced.tables, priced.excess
    excess, cost = np.zeros(1), np.zeros(1, dtype=np.int64)
    steps = []
    for g in range(len(tables.costs)):
        options = np.flatnonzero(tables.is_option[g])
        excess = (excess[:, None] + excess_of[g, options]).ravel()
        cost = (cost[:, None] + tables.costs[g, options]).ravel()
        keep = np.flatnonzero(cost <= priced.spare)
        if len(keep) > _BEAM_WIDTH:
            # Of partial selections with one bound, the costlier has the lower score.
            rank = np.round(excess[keep], 12) - 1e-13 * (cost[keep] / max(priced.spare, 1))
            keep = keep[np.argpartition(rank, _BEAM_WIDTH)[:_BEAM_WIDTH]]
        excess, cost = excess[keep], cost[keep]
        steps.append((keep // len(options), options[keep % len(options)]))
    rows = np.arange(len(cost))
    columns = []
    for parents, choices in reversed(steps):
        columns.append(choices[rows])
        rows = parents[rows]
    return np.stack(columns[::-1], axis=1)
