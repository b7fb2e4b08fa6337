"""Costs: what a limit counts, an exact integer for every layer group in every choice.

Stored bytes decide what a checkpoint takes on disk and in memory, the bytes that a token reads how
fast small batches decode (the objective that NVIDIA's own case study found better than stored
bytes), and multiply-adds in BF16 how fast prompts are read. `cost_table` reads others from a file.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

from autoquant.formats import Choice
from autoquant.plan.accounting import Accounting
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The number that people state a cost in."""

    name: str
    """What follows the number in a sentence."""
    short: str
    """What follows the number of a part; may be empty."""
    meaning: str = ""
    """What the name leaves open, as a clause; empty where it is plain."""
    is_bpe: bool = False
    """Whether it counts what columns named BPE do, all stored bits of the checkpoint."""
    one: Fraction
    """Steps of the cost that make one; zero where nothing counts."""
    uncounted: int
    """Steps of every legal assignment that the number leaves out."""

    def number(self, total: int) -> float:
        """`total` steps in this unit; 0.0 where nothing counts."""
        return float((total - self.uncounted) / self.one) if self.one else 0.0

    def most(self, number: float) -> int:
        """The most steps whose number is not above `number`.

        Exact for the decimal that was written and for what `number` has returned.
        """
        steps = math.floor(Fraction(str(number)) * self.one)
        while self.one and float((steps + 1) / self.one) <= number:
            steps += 1
        return self.uncounted + steps


@dataclass(frozen=True, kw_only=True)
class Cost(ABC):
    """Steps of every assignment of one model under one search space.

    Args:
        accounting: of the plan as it was made; choices that a search closes later change neither
            a step nor the unit.
        scope: what the unit counts; steps are those of the whole model.
    """

    accounting: Accounting = field(repr=False)
    scope: Scope = Scope.CHECKPOINT

    @property
    @abstractmethod
    def name(self) -> str:
        """What results call it."""

    @property
    @abstractmethod
    def unit(self) -> Unit:
        """What people state it in."""

    @abstractmethod
    def of(self, group: str, choice: Choice) -> int:
        """Steps of the group under one of its choices."""

    @property
    def fixed_parts(self) -> Mapping[str, int]:
        """Steps of what belongs to no group, by its name in a sentence."""
        return {}

    @cached_property
    def fixed(self) -> int:
        """Steps of all that belongs to no group."""
        return sum(self.fixed_parts.values())

    def total(self, assignment: Assignment) -> int:
        """Steps of the whole model."""
        groups = self.accounting.groups
        return self.fixed + sum(self.of(g.name, assignment[g.name]) for g in groups)

    def number(self, assignment: Assignment) -> float:
        """What the whole model takes, in the unit."""
        return self.unit.number(self.total(assignment))

    def cheapest(self, choices: Mapping[str, tuple[Choice, ...]]) -> Assignment:
        """The assignment of the fewest steps, each group in one of its `choices`."""
        return self._extreme(min, choices)

    def dearest(self, choices: Mapping[str, tuple[Choice, ...]]) -> Assignment:
        """The assignment of the most steps, each group in one of its `choices`."""
        return self._extreme(max, choices)

    def _extreme(
        self, choose: Callable[..., Choice], choices: Mapping[str, tuple[Choice, ...]]
    ) -> Assignment:
        return Assignment.of(
            {
                name: choose(own, key=lambda choice: self.of(name, choice))
                for name, own in choices.items()
            }
        )

    def parts(self, assignment: Assignment) -> Counter[str]:
        """Steps that the unit counts, by what takes them."""
        is_whole = self.scope is Scope.CHECKPOINT
        parts = Counter(self.fixed_parts if is_whole else {})
        for group in self.accounting.groups:
            is_open = group.name in self.accounting.searched
            if is_whole or is_open:
                what = "weights of the output head" if group.role == "head" else "layers"
                choice = assignment[group.name]
                how = "in" if is_open else "fixed at"
                parts[f"{what} {how} {choice.format.label}"] += self.of(group.name, choice)
        return parts

    @cached_property
    def uncounted(self) -> int:
        """Steps of every legal assignment that the scope leaves out."""
        if self.scope is Scope.CHECKPOINT:
            return 0
        closed = self.accounting.choices.keys() - self.accounting.searched
        return self.fixed + sum(self.of(name, self.accounting.choices[name][0]) for name in closed)
