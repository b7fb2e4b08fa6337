"""Multiple-choice knapsack: one choice per group, least summed score within a byte budget.

Exact for scores of any unit: nothing rests on an absolute tolerance, where mixed-integer solvers
are known to return wrong optima for scores near 1e-9.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autoquant.arrays import Integers
from autoquant.errors import InfeasibleBudget
from autoquant.search.relaxation import Priced, Selection, Tables, beam, optimum


@dataclass(frozen=True)
class Knapsack:
    """Options of each group, with what each one costs and how much it hurts."""

    scores: tuple[tuple[float, ...], ...]
    """Score of each option of each group, any unit, lower is better."""
    costs: tuple[tuple[int, ...], ...]
    """Bytes of each option of each group."""
    budget: int
    """Bytes that the chosen options may cost together."""

    @cached_property
    def floor(self) -> int:
        """Bytes of the cheapest selection."""
        return sum(min(costs) for costs in self.costs)

    def cost(self, selection: Selection) -> int:
        return int(self._tables.costs[self._rows, selection].sum())

    def score(self, selection: Selection) -> float:
        return float(self._tables.scores[self._rows, selection].sum())

    def with_scores(self, scores: Sequence[Sequence[float]]) -> "Knapsack":
        return Knapsack(tuple(map(tuple, scores)), self.costs, self.budget)

    @cached_property
    def _tables(self) -> Tables:
        return Tables.of(self.scores, self.costs)

    @cached_property
    def _rows(self) -> Integers:
        return np.arange(len(self.costs))

    @cached_property
    def _priced(self) -> Priced:
        """Raises InfeasibleBudget: the cheapest selection exceeds the budget."""
        if self.floor > self.budget:
            raise InfeasibleBudget(
                f"the open layers take at least {self.floor} bytes and {self.budget} are left.",
                fix="raise the budget or open more layers.",
            )
        return Priced.best(self._tables, self.budget)

    @cached_property
    def _optimum(self) -> Selection:
        incumbent = self.fill(tuple(self._priced.options.tolist()))
        return self.fill(optimum(self._priced, incumbent))

    def solve(self) -> Selection:
        """The optimum, upgraded until nothing more fits.

        Raises:
            InfeasibleBudget: the cheapest selection exceeds the budget.
        """
        return self._optimum

    def best(self, count: int) -> list[Selection]:
        """Up to `count` distinct filled selections, best score first; the first is the optimum.

        The others come from a beam search ordered by Lagrangian bound, which is exact as long as
        fewer partial selections than the beam's width are in play, and close to it beyond.

        Raises:
            InfeasibleBudget: the cheapest selection exceeds the budget.
        """
        runners_up = self._filled(beam(self._priced))
        found = {self._optimum, *map(tuple, runners_up.tolist())}
        return sorted(found, key=lambda selection: (self.score(selection), selection))[:count]

    def around(self, selection: Selection, group: int, option: int) -> Selection | None:
        """The selection with one group changed, at the least further change that fits and fills.

        Other groups give way, least loss per byte first, until the budget holds; what is then left
        is spent on upgrades. None if the others cannot give enough.
        """
        chosen = [*selection]
        chosen[group] = option
        while (excess := self.cost(tuple(chosen)) - self.budget) > 0:
            downgrades = [
                ((self.scores[g][i] - self.scores[g][chosen[g]]) / min(saved, excess), g, i)
                for g, costs in enumerate(self.costs)
                for i, cost in enumerate(costs)
                if g != group and (saved := costs[chosen[g]] - cost) > 0
            ]
            if not downgrades:
                return None
            _, g, i = min(downgrades)
            chosen[g] = i
        return self.fill(tuple(chosen), keep=group)

    def fill(self, selection: Selection, *, keep: int | None = None) -> Selection:
        """Spend what the budget leaves: upgrades that fit, best gain per byte first.

        Among options that cost more, the one with the lowest score is an upgrade even where
        noise makes its score no lower: more bits never carry less information.

        Args:
            selection: within the budget.
            keep: a group whose option stays, unless nothing else is left to upgrade.
        """
        return tuple(self._filled(np.array([selection]), keep=keep)[0].tolist())

    def _filled(self, selections: Integers, *, keep: int | None = None) -> Integers:
        """`fill` for many selections at once, [P, G]."""
        scores, costs = self._tables.scores, self._tables.costs
        chosen = selections.copy()
        taken = costs[self._rows, chosen]
        left = self.budget - taken.sum(axis=1)
        open_rows = np.arange(len(chosen))
        while len(open_rows):
            extra = costs - taken[open_rows, :, None]
            fits = (extra > 0) & (extra <= left[open_rows, None, None])
            places, groups, options = np.nonzero(fits)
            cost, rows = extra[fits], open_rows[places]
            gains = (scores[groups, chosen[rows, groups]] - scores[groups, options]) / cost
            order = np.lexsort((-cost, gains, groups != keep, rows))
            is_last = np.diff(rows[order], append=-1) != 0
            best = order[is_last]  # the last of equals, as lexsort is stable
            open_rows, groups, options = rows[best], groups[best], options[best]
            chosen[open_rows, groups] = options
            taken[open_rows, groups] = costs[groups, options]
            left[open_rows] -= cost[best]
        return chosen
