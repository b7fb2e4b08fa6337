"""Multiple-choice knapsack: one choice per group, least summed score within a byte budget.

Exact through HiGHS (scipy). Scores are divided by their largest before they reach it, because
mixed-integer solvers work to absolute tolerances: CBC is known to return wrong optima for scores
near 1e-9.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from autoquant.errors import InfeasibleBudget
from autoquant.search.quiet import quiet_library

Floats = np.ndarray[Any, np.dtype[np.float64]]
_BEAM_WIDTH = 2048
"""Partial selections kept at each step of the search for runners-up."""

Selection = tuple[int, ...]
"""Index of the chosen option of each group."""


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
        return sum(costs[i] for costs, i in zip(self.costs, selection, strict=True))

    def score(self, selection: Selection) -> float:
        return float(sum(scores[i] for scores, i in zip(self.scores, selection, strict=True)))

    def with_scores(self, scores: Sequence[Sequence[float]]) -> "Knapsack":
        return Knapsack(tuple(map(tuple, scores)), self.costs, self.budget)

    def solve(self) -> Selection:
        """The optimum, upgraded until nothing more fits.

        Raises:
            InfeasibleBudget: the cheapest selection exceeds the budget.
        """
        return self.fill(self._optimum())

    def best(self, count: int) -> list[Selection]:
        """Up to `count` distinct filled selections, best score first; the first is the optimum.

        The others come from a beam search ordered by Lagrangian bound, which is exact as long as
        fewer partial selections than the beam's width are in play, and close to it beyond.

        Raises:
            InfeasibleBudget: the cheapest selection exceeds the budget.
        """
        found = dict.fromkeys(map(self.fill, [self._optimum(), *_beam(self)]))
        return sorted(found, key=self.score)[:count]

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

    def _optimum(self) -> Selection:
        if self.floor > self.budget:
            raise InfeasibleBudget(
                f"the open layers take at least {self.floor} bytes and {self.budget} are left.",
                fix="raise the budget or open more layers.",
            )
        return _solve_program(self)

    def fill(self, selection: Selection, *, keep: int | None = None) -> Selection:
        """Spend what the budget leaves: upgrades that fit, best gain per byte first.

        Among options that cost more, the one with the lowest score is an upgrade even where
        noise makes its score no lower: more bits never carry less information.

        Args:
            selection: within the budget.
            keep: a group whose option stays, unless nothing else is left to upgrade.
        """
        chosen, left = list(selection), self.budget - self.cost(selection)
        while True:
            upgrades = [
                (g != keep, (self.scores[g][chosen[g]] - self.scores[g][i]) / extra, -extra, g, i)
                for g, costs in enumerate(self.costs)
                for i, cost in enumerate(costs)
                if 0 < (extra := cost - costs[chosen[g]]) <= left
            ]
            if not upgrades:
                return tuple(chosen)
            *_, group, option = max(upgrades)
            left -= self.costs[group][option] - self.costs[group][chosen[group]]
            chosen[group] = option


def _beam(knapsack: Knapsack) -> list[Selection]:
    """Feasible selections of low Lagrangian bound.

    For a multiplier m >= 0, sum_g min_i (score + m * cost) - m * budget is at most the optimum
    (Fisher, The Lagrangian relaxation method, 1981). It splits over groups: an option adds to the
    bound of a partial selection what it is worse than its group's best priced option.
    """
    multiplier = _best_multiplier(knapsack)
    cheapest = [min(costs) for costs in knapsack.costs]
    needed = knapsack.floor
    unit = max(max(np.abs(scores).max() for scores in knapsack.scores), 1e-300)
    excess, cost = np.zeros(1), np.zeros(1, dtype=np.int64)
    steps = []
    for g, options in enumerate(knapsack.costs):
        priced = _priced(knapsack, g, multiplier)
        needed -= cheapest[g]
        excess = (excess[:, None] + (priced - priced.min())).ravel()
        cost = (cost[:, None] + np.array(options, dtype=np.int64)).ravel()
        keep = np.flatnonzero(cost + needed <= knapsack.budget)
        # Of partial selections with one bound, the costlier has the lower score.
        bound = np.round(excess[keep] / unit, 12)
        keep = keep[np.lexsort((-cost[keep], bound))[:_BEAM_WIDTH]]
        excess, cost = excess[keep], cost[keep]
        steps.append((keep // len(options), keep % len(options)))
    rows = np.arange(len(cost))
    columns = []
    for parents, choices in reversed(steps):
        columns.append(choices[rows])
        rows = parents[rows]
    return [tuple(map(int, row)) for row in np.stack(columns[::-1], axis=1)]


def _priced(knapsack: Knapsack, group: int, multiplier: float) -> Floats:
    scores = np.array(knapsack.scores[group])
    return scores + multiplier * np.array(knapsack.costs[group], dtype=np.float64)


def _best_multiplier(knapsack: Knapsack) -> float:
    """The multiplier of the highest bound, by bisection on the cost of the priced optimum."""
    scores = [s for options in knapsack.scores for s in options]
    low, high = 0.0, max(max(scores) - min(scores), 1e-300)
    for _ in range(100):
        middle = (low + high) / 2
        cost = sum(
            costs[int(_priced(knapsack, g, middle).argmin())]
            for g, costs in enumerate(knapsack.costs)
        )
        low, high = (middle, high) if cost > knapsack.budget else (low, middle)
    return high


def _solve_program(knapsack: Knapsack) -> Selection:
    """The optimum of the binary program; the knapsack is feasible."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    sizes = [len(options) for options in knapsack.scores]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    scores = np.array([s for options in knapsack.scores for s in options], dtype=np.float64)
    objective = scores / max(np.abs(scores).max(), np.finfo(np.float64).tiny)
    one_each = np.zeros((len(sizes), len(scores)))
    for g in range(len(sizes)):
        one_each[g, offsets[g] : offsets[g + 1]] = 1.0
    # Bytes over the cheapest option keep the row's numbers small.
    extra = np.array([c - min(costs) for costs in knapsack.costs for c in costs], dtype=np.float64)
    scale = max(extra.max(), 1.0)
    spare = knapsack.budget - knapsack.floor
    while True:
        with quiet_library():
            result = milp(
                objective,
                constraints=[
                    LinearConstraint(one_each, 1.0, 1.0),
                    LinearConstraint(extra[None] / scale, -np.inf, spare / scale),
                ],
                integrality=np.ones(len(scores)),
                bounds=Bounds(0.0, 1.0),
                options={"mip_rel_gap": 0.0},
            )
        selection = tuple(
            int(np.argmax(result.x[offsets[g] : offsets[g + 1]])) for g in range(len(sizes))
        )
        overspent = knapsack.cost(selection) - knapsack.budget
        if overspent <= 0:
            return selection
        # The solver's row tolerance let it overspend by a few bytes: ask for less.
        spare -= overspent
