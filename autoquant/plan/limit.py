"""Limits: a cost and the most of it, one integer that is resolved once and then only compared."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from autoquant.decimals import shortest
from autoquant.errors import ConfigError, InfeasibleBudget
from autoquant.formats import Choice
from autoquant.plan.assignment import Assignment
from autoquant.plan.cost import Cost


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The most of a cost that an assignment may take."""

    cost: Cost = field(repr=False)
    asked: float
    """What the user wrote, in the cost's unit."""
    at_most: int
    """Steps of the cost, of the whole model."""

    @classmethod
    def of(cls, cost: Cost, asked: float) -> Self:
        """Resolve a number of the cost's unit.

        Raises:
            ConfigError: negative or not finite.
        """
        if not 0 <= asked < math.inf:
            raise ConfigError(
                f"a limit of {shortest(asked)} {cost.unit.name} is not a number from 0 up.",
                fix="give the most that an assignment may take.",
            )
        return cls(cost=cost, asked=asked, at_most=cost.unit.most(asked))

    def fits(self, assignment: Assignment) -> bool:
        """Whether the assignment keeps the limit."""
        return self.cost.total(assignment) <= self.at_most

    def taken(self, assignment: Assignment) -> float:
        """What the assignment takes, in the unit of `asked`."""
        return self.cost.number(assignment)

    def require_feasible(self, choices: Mapping[str, tuple[Choice, ...]]) -> None:
        """Return if some assignment of these choices keeps the limit.

        Raises:
            InfeasibleBudget: none does; says the floor and what holds it up.
        """
        floor = self.cost.cheapest(choices)
        if self.fits(floor):
            return
        unit, lowest = self.cost.unit, self.taken(floor)
        parts = self.cost.parts(floor).most_common(3)
        held_up = ", ".join(
            f"{what} take {float(steps / unit.one):.2f} {unit.short}".rstrip()
            for what, steps in parts
        )
        raise InfeasibleBudget(
            f"a budget of {shortest(self.asked)} {unit.name} is below the floor of {lowest:.3f}: "
            f"{held_up}.",
            fix=f"allow at least {math.ceil(lowest * 100) / 100:.2f} {unit.name}, or open more "
            "in the search space.",
        )

    def to_dict(self, assignment: Assignment) -> dict[str, Any]:
        """What readers of a result need to know of the limit and what the assignment takes of it.

        Returns:
            `cost` (its name), `unit`, `meaning` and `is_bpe` (those of `Unit`), `asked` and `taken`
            in the unit, `at_most` and `total` in steps of the cost.
        """
        unit, total = self.cost.unit, self.cost.total(assignment)
        return {
            "cost": self.cost.name,
            "unit": unit.name,
            "meaning": unit.meaning,
            "is_bpe": unit.is_bpe,
            "asked": self.asked,
            "taken": unit.number(total),
            "at_most": self.at_most,
            "total": total,
        }
