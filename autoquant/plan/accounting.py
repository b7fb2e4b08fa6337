"""Exact sizes in bytes and bits per element.

Checkpoint bytes are the data of every tensor that the exported checkpoint stores; elements are
those of every tensor of the source.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from autoquant.formats import BF16, Choice
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Scope
from autoquant.plan.grouping import Groups
from autoquant.source.headers import Headers

BYTE_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """Sizes of every assignment of one model under one search space."""

    headers: Headers
    groups: Groups
    choices: Mapping[str, tuple[Choice, ...]]
    """Legal choices of each group; a group with one choice is not searched."""
    added_bytes: int = 0
    """Of tensors that the checkpoint stores besides those of the source: scales of its cache."""

    @property
    def elements(self) -> int:
        """Elements of every tensor of the source."""
        return self.headers.elements

    @cached_property
    def searched(self) -> frozenset[str]:
        """Names of the groups with more than one choice."""
        return frozenset(name for name, choices in self.choices.items() if len(choices) > 1)

    @cached_property
    def searched_elements(self) -> int:
        return sum(self.groups[name].elements for name in self.searched)

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of the tensors that belong to no group."""
        fixed = sum(self.headers[tensor.name].bytes for tensor in self.groups.fixed)
        return fixed + self.added_bytes

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
        return self._group_bytes[key]

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
