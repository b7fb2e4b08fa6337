"""Multiple-choice knapsack: one choice per group, least summed score within one limit or two.

Exact for scores of any unit: nothing rests on an absolute tolerance, where mixed-integer solvers
are known to return wrong optima for scores near 1e-9. Where scores follow the costs so closely that
the search for the optimum outgrows memory, a beam takes its place, and the gap to a bound is told.

Shapes: L limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from autoquant.arrays import Integers
from autoquant.errors import InfeasibleBudget
from autoquant.search.filling import Filling
from autoquant.search.partial import beam, optimum
from autoquant.search.relaxation import Priced, Selection, Tables

_SMALL_GAP = 1e-3
"""Of a solution's score; joint measurements do not tell assignments so alike apart."""


@dataclass(frozen=True, slots=True)
class Solution:
    """A selection that keeps the limits, and how far it may be from the optimum."""

    selection: Selection
    score: float
    bound: float
    """What no selection within the limits scores less than."""

    @property
    def gap(self) -> float:
        """What the score is above the bound; zero where the selection is known to be optimal."""
        return max(0.0, self.score - self.bound)

    def caution(self) -> str | None:
        """What a user should know of the gap, or None where it is too small to matter."""
        if self.gap <= _SMALL_GAP * abs(self.score):
            return None
        return (
            "the layers' sensitivities follow their sizes so closely that no exact optimum was "
            f"found: the summed KL of the solver's is up to {self.gap / abs(self.score):.1%} above "
            "the least."
        )


@dataclass(frozen=True, slots=True)
class Constraint:
    """What options cost of one limit."""

    costs: tuple[tuple[int, ...], ...]
    """Of each option of each group."""
    budget: int
    """What the chosen options may cost together."""

    @property
    def floor(self) -> int:
        """Cost of the cheapest selection."""
        return sum(min(costs) for costs in self.costs)

    def cost(self, selection: Selection) -> int:
        """What the selection takes."""
        return sum(costs[option] for costs, option in zip(self.costs, selection, strict=True))


@dataclass(frozen=True)
class Knapsack:
    """Options of each group, with what each one costs and how much it hurts.

    `solve` is the optimum only for scores that never rise with cost. It goes on from the optimum
    and takes whatever upgrade fits, so that scores which rise with cost by noise end above it; the
    gap of `solution` counts that too.
    """

    scores: tuple[tuple[float, ...], ...]
    """Score of each option of each group, any unit, lower is better."""
    costs: tuple[tuple[int, ...], ...]
    """What each option of each group takes of the first limit."""
    budget: int
    """What the chosen options may cost together."""
    second: Constraint | None = None
    """A second limit that holds too."""
    finer: tuple[tuple[tuple[bool, ...], ...], ...] | None = None
    """Of each group, whether the option of a column is known to be no worse than that of a row,
    whatever the scores say; whatever costs more unless named."""

    @cached_property
    def constraints(self) -> tuple[Constraint, ...]:
        first = Constraint(self.costs, self.budget)
        return (first,) if self.second is None else (first, self.second)

    @property
    def floor(self) -> int:
        """What the cheapest selection takes of the first limit."""
        return self.constraints[0].floor

    def cost(self, selection: Selection) -> int:
        """What the selection takes of the first limit."""
        return self.constraints[0].cost(selection)

    def fits(self, selection: Selection) -> bool:
        """Whether the selection keeps every limit."""
        return all(one.cost(selection) <= one.budget for one in self.constraints)

    def score(self, selection: Selection) -> float:
        return float(self._tables.scores[np.arange(len(self.costs)), selection].sum())

    def with_scores(self, scores: Sequence[Sequence[float]]) -> "Knapsack":
        return replace(self, scores=tuple(map(tuple, scores)))

    def solve(self) -> Selection:
        """The optimum, upgraded until nothing more fits.

        Raises:
            InfeasibleBudget: no selection keeps the limits.
        """
        return self.solution.selection

    @cached_property
    def solution(self) -> Solution:
        """The optimum, upgraded until nothing more fits, and its distance to the bound.

        Raises:
            InfeasibleBudget: no selection keeps the limits.
        """
        incumbent = self._incumbent
        found = optimum(self._priced, incumbent)
        if found is not None:
            filled = self.fill(found)
            return Solution(filled, self.score(filled), self.score(found))
        best = min([incumbent, *self._runners_up], key=self.score)
        bound = (self._priced.bound - self._priced.rounding) * self._tables.largest
        return Solution(best, self.score(best), bound)

    def best(self, count: int) -> list[Selection]:
        """Up to `count` distinct filled selections, best score first; the first is the optimum.

        The others come from a beam search ordered by Lagrangian bound, which is exact as long as
        fewer partial selections than the beam's width are in play, and close to it beyond.

        Raises:
            InfeasibleBudget: no selection keeps the limits.
        """
        optimum = self.solve()
        found = {optimum, *self._runners_up}
        return sorted(found, key=lambda s: (self.score(s), s != optimum, s))[:count]

    def around(self, selection: Selection, group: int, option: int) -> Selection | None:
        """The selection with one group changed, at the least further change that fits and fills.

        Other groups give way, least loss per cost first, until the limits hold; what is then left
        is spent on upgrades. None if the others cannot give enough, one group at a time.
        """
        changed = np.array(selection)
        changed[group] = option
        found = self._filling.around(changed, group)
        return None if found is None else self.fill(tuple(found.tolist()), keep=group)

    def fill(self, selection: Selection, *, keep: int | None = None) -> Selection:
        """Spend what the limits leave on upgrades, best gain per cost first.

        Args:
            selection: within the limits.
            keep: a group whose option stays, unless nothing else is left to upgrade.
        """
        return self._filled([selection], keep=keep)[0]

    @cached_property
    def least_of_second(self) -> Selection:
        """The selection that takes the least of the second limit within the first.

        Known to be the least unless costs follow each other so closely that lists outgrow memory.
        """
        assert self.second is not None
        scores = tuple(tuple(map(float, costs)) for costs in self.second.costs)
        never = tuple(tuple((False,) * len(own) for _ in own) for own in self.costs)
        return Knapsack(scores, self.costs, self.budget, finer=never).solve()

    @cached_property
    def _tables(self) -> Tables:
        return Tables.of(self.scores, *(one.costs for one in self.constraints))

    @cached_property
    def _budgets(self) -> Integers:
        """[L]."""
        return np.array([one.budget for one in self.constraints], dtype=np.int64)

    @cached_property
    def _filling(self) -> Filling:
        options = self._tables.scores.shape[1]
        finer = np.full((len(self.costs), options, options), self.finer is None)
        for g, own in enumerate(self.finer or ()):
            finer[g, : len(own), : len(own)] = own
        return Filling(self._tables, self._budgets, finer)

    @cached_property
    def _priced(self) -> Priced:
        """Raises InfeasibleBudget: the cheapest selection exceeds a budget."""
        for one in self.constraints:
            if one.floor > one.budget:
                raise InfeasibleBudget(
                    f"the open layers take at least {one.floor} and {one.budget} are left.",
                    fix="raise the limit or open more layers.",
                )
        return Priced.best(self._tables, self._budgets)

    @cached_property
    def _incumbent(self) -> Selection:
        """A good selection to begin with."""
        priced = tuple(self._priced.options.tolist())
        if self.second is None:
            return self.fill(priced)
        found = [*self._filled([priced] if self.fits(priced) else []), *self._runners_up]
        if not found:
            if not self.fits(self.least_of_second):
                raise InfeasibleBudget(
                    "the open layers cannot keep both limits at once.",
                    fix="raise one of them or open more layers.",
                )
            found = [self.fill(self.least_of_second)]
        return min(found, key=self.score)

    @cached_property
    def _runners_up(self) -> list[Selection]:
        return self._filled(beam(self._priced).tolist())

    def _filled(
        self, selections: Sequence[Sequence[int]], *, keep: int | None = None
    ) -> list[Selection]:
        """`fill` for many selections at once."""
        chosen = np.array(selections, dtype=np.int64).reshape(-1, len(self.costs))
        return [tuple(row) for row in self._filling.filled(chosen, keep=keep).tolist()]
