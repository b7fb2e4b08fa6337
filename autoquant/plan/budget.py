"""Exact sizes in bytes, bits per element, and whether a budget can be met.

Checkpoint bytes are the data of every tensor that the exported checkpoint stores; elements are
those of every tensor of the source.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from functools import cached_property

from autoquant.errors import ConfigError, InfeasibleBudget
from autoquant.formats import BF16, Choice, all_formats
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import Groups
from autoquant.source.headers import Headers

BYTE_BITS = 8


class Scope(StrEnum):
    """What bits per element count."""

    CHECKPOINT = "checkpoint"
    """Every tensor of the checkpoint."""
    SEARCHED = "searched"
    """The layer groups that the search space leaves open."""


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """Sizes of every assignment of one model under one search space."""

    headers: Headers
    groups: Groups
    choices: Mapping[str, tuple[Choice, ...]]
    """Legal choices of each group; a group with one choice is not searched."""
    added_bytes: int = 0
    """Of tensors that the checkpoint stores besides those of the source: scales of its cache."""
    shares: Mapping[str, Fraction] = field(default_factory=dict)
    """Share of a group or a fixed tensor that counts, by name; all of it unless named. Bytes of a
    share are rounded up."""

    @cached_property
    def elements(self) -> int:
        """Elements of every tensor of the source."""
        uncounted = sum(
            self._elements(name) - self._counted(name, self._elements(name)) for name in self.shares
        )
        return self.headers.elements - uncounted

    @cached_property
    def searched(self) -> frozenset[str]:
        """Names of the groups with more than one choice."""
        return frozenset(name for name, choices in self.choices.items() if len(choices) > 1)

    @cached_property
    def searched_elements(self) -> int:
        return sum(self._counted(name, self._elements(name)) for name in self.searched)

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of the tensors that belong to no group."""
        fixed = sum(self.tensor_bytes(tensor.name) for tensor in self.groups.fixed)
        return fixed + self.added_bytes

    def tensor_bytes(self, name: str) -> int:
        """Bytes of a tensor that belongs to no group."""
        return self._counted(name, self.headers[name].bytes)

    @cached_property
    def _group_bytes(self) -> dict[tuple[str, str], int]:
        """Bytes of groups by what a checkpoint declares of them, as far as they were asked for."""
        return {}

    def group_bytes(self, group: str, choice: Choice) -> int:
        """Bytes of every tensor that the group stores under `choice`; BF16 is as in the source."""
        key = group, choice.form
        if key not in self._group_bytes:
            own = self.groups[group]
            self._group_bytes[key] = (
                sum(self.headers[linear.tensor].bytes for linear in own.linears)
                if choice == BF16
                else own.bytes_under(choice)
            )
        return self._counted(group, self._group_bytes[key])

    def _counted(self, name: str, size: int) -> int:
        return math.ceil(size * self.shares[name]) if name in self.shares else size

    def _elements(self, name: str) -> int:
        """Elements of a group or a fixed tensor, all of them."""
        known = self.groups.by_name
        return known[name].elements if name in known else self.headers[name].elements

    def checkpoint_bytes(self, assignment: Assignment) -> int:
        """Bytes of all tensor data of the exported checkpoint."""
        return self.fixed_bytes + sum(
            self.group_bytes(group.name, assignment[group.name]) for group in self.groups
        )

    def searched_bytes(self, assignment: Assignment) -> int:
        """Bytes of the tensor data of the groups that are searched."""
        return sum(self.group_bytes(name, assignment[name]) for name in self.searched)

    def bpe(self, assignment: Assignment, scope: Scope = Scope.CHECKPOINT) -> float:
        """Bits per element; 0.0 in the scope `searched` of a space that leaves nothing open."""
        if scope is Scope.CHECKPOINT:
            return BYTE_BITS * self.checkpoint_bytes(assignment) / self.elements
        if not self.searched_elements:
            return 0.0
        return BYTE_BITS * self.searched_bytes(assignment) / self.searched_elements

    @cached_property
    def floor(self) -> Assignment:
        """The legal assignment of the fewest bytes."""
        return self._extreme(cheapest=True)

    @cached_property
    def ceiling(self) -> Assignment:
        """The legal assignment of the most bytes."""
        return self._extreme(cheapest=False)

    def _extreme(self, *, cheapest: bool) -> Assignment:
        choose = min if cheapest else max
        return Assignment.of(
            {
                name: choose(choices, key=lambda choice: self.group_bytes(name, choice))
                for name, choices in self.choices.items()
            }
        )


MOST_BPE = 64
"""Bits of an element of the widest type that a checkpoint may hold."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The most bits per element that the checkpoint may store.

    Raises:
        ConfigError: not a positive number, or more than any tensor takes.
    """

    bpe: float
    scope: Scope = Scope.CHECKPOINT

    def __post_init__(self) -> None:
        if not 0 < self.bpe <= MOST_BPE:
            raise ConfigError(
                f"a budget of {self.bpe:g} bits per element is not between 0 and {MOST_BPE}.",
                fix=f"{_bits_of_formats()}.",
            )

    def max_bytes(self, accounting: Accounting) -> int:
        """The most checkpoint bytes whose `Accounting.bpe` does not exceed the budget.

        In the scope `searched`, what is not searched comes on top.
        """
        if self.scope is Scope.CHECKPOINT:
            return self._most(accounting.elements)
        floor = accounting.floor
        rest = accounting.checkpoint_bytes(floor) - accounting.searched_bytes(floor)
        return rest + self._most(accounting.searched_elements)

    def _most(self, elements: int) -> int:
        """Exact for the decimal that was written and for a BPE that was reported."""
        size = math.floor(Fraction(str(self.bpe)) * elements / BYTE_BITS)
        while elements and BYTE_BITS * (size + 1) / elements <= self.bpe:
            size += 1
        return size


def _bits_of_formats() -> str:
    bits = (f"{format.label} takes {float(format.weight_bits):g}" for format in all_formats())
    return ", ".join(bits) + " bits per element"


def require_feasible(accounting: Accounting, budget: Budget) -> None:
    """Return if some legal assignment keeps the budget.

    Raises:
        InfeasibleBudget: none does; says the floor and what holds it up.
    """
    floor = accounting.floor
    if accounting.checkpoint_bytes(floor) <= budget.max_bytes(accounting):
        return
    lowest = accounting.bpe(floor, budget.scope)
    raise InfeasibleBudget(
        f"a budget of {budget.bpe:g} bits per element (scope {budget.scope}) is below the floor "
        f"of {lowest:.3f}: {_what_holds_it_up(accounting, budget.scope)}.",
        fix=f"allow at least {math.ceil(lowest * 100) / 100:.2f} with --budget-bpe, or open more "
        "in the search space.",
    )


def _what_holds_it_up(accounting: Accounting, scope: Scope) -> str:
    """The largest parts of the floor, in bits per element of the scope."""
    parts: Counter[str] = Counter()
    for group in accounting.groups:
        if scope is Scope.SEARCHED and group.name not in accounting.searched:
            continue
        choice = accounting.floor[group.name]
        what = "weights of the output head" if group.role == "head" else "layers"
        how = "fixed at" if choice == BF16 else "in"
        size = accounting.group_bytes(group.name, choice)
        parts[f"{what} {how} {choice.format.label}"] += size
    if scope is Scope.CHECKPOINT:
        for tensor in accounting.groups.fixed:
            dtype = accounting.headers[tensor.name].dtype
            parts[f"{tensor.reason} fixed at {dtype}"] += accounting.tensor_bytes(tensor.name)
    elements = accounting.elements if scope is Scope.CHECKPOINT else accounting.searched_elements
    return ", ".join(
        f"{what} take {BYTE_BITS * size / elements:.2f} bits" for what, size in parts.most_common(3)
    )
