"""Lagrangian bounds of a multiple-choice knapsack under one limit or two.

For multipliers m_k >= 0, sum_g min_i (score + sum_k m_k * cost_k) - sum_k m_k * budget_k is at most
the optimum (Fisher, The Lagrangian relaxation method, 1981). It splits over groups: an option adds
to the bound of a partial selection what it is worse than its group's best priced option, its
excess.

Shapes: L limits, G groups, F options of the group that has most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autoquant.arrays import Booleans, Floats, Integers

Selection = tuple[int, ...]
"""Index of the chosen option of each group."""

_STEPS = 100
"""Of a bisection; it ends before where floats do."""
_DEAREST = 3.0
"""A multiplier at which every group's cheapest option is priced best: normalized scores differ by
two at most, and costs by one at least."""
_ROUNDING = 1e-12
"""Of sums of scores, relative to the largest score times the number of groups."""


@dataclass(frozen=True)
class Tables:
    """Options as arrays; groups with fewer than F are padded with infinite scores."""

    scores: Floats
    """[G, F]."""
    costs: Integers
    """[L, G, F]; zero where there is no option."""

    @classmethod
    def of(cls, scores: Sequence[Sequence[float]], *costs: Sequence[Sequence[int]]) -> "Tables":
        """From rows of each group's options; the costs of one limit after those of another."""
        shape = len(scores), max(map(len, scores))
        padded_scores = np.full(shape, np.inf)
        padded_costs = np.zeros((len(costs), *shape), dtype=np.int64)
        for g, own_scores in enumerate(scores):
            padded_scores[g, : len(own_scores)] = own_scores
            for k, table in enumerate(costs):
                padded_costs[k, g, : len(own_scores)] = table[g]
        return cls(padded_scores, padded_costs)

    @cached_property
    def is_option(self) -> Booleans:
        """[G, F]."""
        return np.isfinite(self.scores)

    @property
    def cheapest(self) -> Integers:
        """Cost of each group's cheapest option, [L, G]."""
        most = np.iinfo(np.int64).max
        return np.asarray(np.where(self.is_option, self.costs, most).min(axis=2))

    @property
    def largest(self) -> float:
        """Magnitude of the largest score."""
        largest = np.abs(self.scores[self.is_option]).max()
        return float(max(largest, np.finfo(np.float64).tiny))

    def normalized(self) -> "Tables":
        """The largest score at one, whatever the unit; costs beyond each group's cheapest option,
        so that sums of both are of a size.
        """
        beyond = self.costs - self.cheapest[:, :, None]
        return Tables(self.scores / self.largest, np.where(self.is_option, beyond, 0))


@dataclass(frozen=True)
class Priced:
    """A knapsack at the multipliers of its highest bound."""

    tables: Tables
    """Normalized."""
    spare: Integers
    """What the budgets leave beyond each limit's cheapest selection, [L]."""
    multipliers: Floats
    """Score per step of each cost, [L]."""

    @classmethod
    def best(cls, tables: Tables, budgets: Integers) -> "Priced":
        """Of one limit by bisection on the cost of the priced optimum, and around it of another.

        Args:
            tables: of the options.
            budgets: [L].
        """
        spare = budgets - tables.cheapest.sum(axis=1)
        tables = tables.normalized()
        if len(spare) == 1:
            return cls(tables, spare, np.array([_multiplier(tables.scores, tables, spare)]))
        return max(_around(tables, spare), key=lambda priced: priced.bound)

    @cached_property
    def prices(self) -> Floats:
        """[G, F]."""
        return _prices(self.tables.scores, self.multipliers, self.tables.costs)

    @property
    def options(self) -> Integers:
        """Each group's option of least price, [G]: within the budget of a single limit."""
        return np.asarray(self.prices.argmin(axis=1))

    @property
    def excess(self) -> Floats:
        """[G, F]; infinite where there is no option."""
        return np.asarray(self.prices - self.prices.min(axis=1, keepdims=True))

    @property
    def price_of_spare(self) -> float:
        return float(self.multipliers @ self.spare)

    @property
    def bound(self) -> float:
        """What no selection within the budgets scores less than, but for `rounding`."""
        return float(self.prices.min(axis=1).sum() - self.price_of_spare)

    @property
    def rounding(self) -> float:
        """What sums of this size may be off by."""
        size = max(len(self.prices), float(np.abs(self.prices.min(axis=1)).sum()))
        return _ROUNDING * (size + self.price_of_spare)


def _multiplier(scores: Floats, tables: Tables, spare: Integers) -> float:
    """The least multiplier of the first cost at which the priced optimum keeps its budget."""
    low, high = 0.0, _DEAREST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        options = (scores + middle * tables.costs[0]).argmin(axis=1)
        low, high = (middle, high) if _cost(tables, options, 0) > spare[0] else (low, middle)
    return high


def _around(tables: Tables, spare: Integers) -> list[Priced]:
    """Multipliers of two limits that a bisection on the second one's share of the prices visits.

    A weight s blends (1 - s) * score + s * cost, from the scores alone to the second cost
    alone, whatever the scales of both.
    """
    largest = max(1, int(tables.costs[1].max()))
    visited: list[Priced] = []
    low, share, high = 0.0, 0.0, 1.0
    for _ in range(_STEPS):
        mixed = (1.0 - share) * tables.scores + share * (tables.costs[1] / largest)
        multipliers = np.array([_multiplier(mixed, tables, spare), share / largest])
        priced = Priced(tables, spare, multipliers / (1.0 - share))
        visited.append(priced)
        is_over = _cost(tables, priced.options, 1) > spare[1]
        low, high = (share, high) if is_over else (low, share)
        share = (low + high) / 2
        if not low < share < high:
            break
    return visited


def _prices(scores: Floats, multipliers: Floats, costs: Integers) -> Floats:
    for multiplier, cost in zip(multipliers, costs, strict=True):
        scores = scores + multiplier * cost
    return scores


def _cost(tables: Tables, options: Integers, limit: int) -> int:
    taken = np.take_along_axis(tables.costs[limit], options[:, None], axis=1)
    return int(taken.sum())
