"""Search spaces: which layer groups may take which choices, and why the others are closed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Self

from autoquant.formats import (
    A16,
    BF16,
    CAST,
    GPTQ,
    NEAREST,
    PLAIN_RULES,
    Choice,
    Format,
    ScaleRule,
    all_formats,
)
from autoquant.plan.grouping import Groups, SharedExperts
from autoquant.plan.linears import LayerGroup
from autoquant.source.names import LEFT_ROLES

ROLE = re.compile(r"[a-z_]+")
"""A pattern of this form names a role; any other is a glob over group names."""


Way = tuple[str | None, str]
"""A scale rule, None for formats without one, and a rounding, which take the same bits."""


class Effort(StrEnum):
    """What a search tries at equal bits."""

    FAST = "fast"
    """Codes of the weight alone."""
    DEFAULT = "default"
    """Codes fitted to inputs too, which calibration has to collect second moments for."""
    MAX = "max"
    """And the winner polished: its weights refitted to what the quantized blocks before give."""

    @property
    def polishes(self) -> bool:
        """Whether the winner of a search is polished."""
        return self is Effort.MAX

    @property
    def ways(self) -> tuple[Way, ...]:
        """Scale rules and roundings that a format without either stands for in a search space.

        Fitted codes fall back to plain ones linear by linear, so that few of them are enough: in
        the search of the bundled model at 5 bits every NVFP4 group of the winner takes one of
        these two. Plain ones stay beside them: recipes are measured with them, and the joint check
        of a rounding replaces it by them.
        """
        plain: tuple[Way, ...] = (*((str(rule), NEAREST) for rule in PLAIN_RULES), (None, NEAREST))
        if self is Effort.FAST:
            return plain
        return (*plain, (str(ScaleRule.MSE), GPTQ), (str(ScaleRule.HESSIAN), GPTQ), (None, GPTQ))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What the groups that it matches may take."""

    match: tuple[str, ...]
    """Roles (`experts`) and globs over group names (`model.layers.0.*`)."""
    choices: tuple[Choice, ...]
    reason: str
    """Why formats are left out; shown by `autoquant plan`."""
    casts: frozenset[str] = frozenset()
    """Formats that the rule opens as such: groups whose source stores such codes may keep them."""

    def matches(self, group: LayerGroup) -> bool:
        """Whether some pattern names the group's role or fits its name.

        What nothing is known of, and an indexer, is reached by its role or by its own name, and
        not by a pattern that takes whatever is there, such as `*` or `model.layers.0.*`.
        """
        return any(
            pattern == group.role
            if ROLE.fullmatch(pattern)
            else fnmatchcase(group.name, pattern)
            and not (group.role in LEFT_ROLES and pattern.rpartition(".")[2] == "*")
            for pattern in self.match
        )

    def choices_of(self, group: LayerGroup) -> tuple[Choice, ...]:
        """What the rule opens for a group that it matches; keeping codes where they are there."""
        found = [choice for choice in self.choices if not choice.is_cast or _keeps(group, choice)]
        if group.casts_to in self.casts:
            inputs = dict.fromkeys(c.input for c in found if c.format.name == group.casts_to)
            kept = Choice.parse(f"{group.casts_to}/{CAST}")
            found += [replace(kept, input=own) for own in inputs]
        return tuple(sorted(dict.fromkeys(found), key=lambda choice: choice.format.weight_bits))

    @property
    def only_protects(self) -> bool:
        """Whether the rule keeps roles in BF16, which means nothing to a model without them."""
        return self.choices == (BF16,) and all(map(ROLE.fullmatch, self.match))


@dataclass(frozen=True, kw_only=True)
class Options:
    """The legal choices of every group of one model, cheapest format first."""

    choices: Mapping[str, tuple[Choice, ...]] = field(repr=False)
    closed: Mapping[str, Mapping[Format, str]] = field(repr=False)
    """Of each group: the formats that it cannot take, and why."""
    warnings: tuple[str, ...]
    """What in the space cannot be meant: rules without effect."""

    @cached_property
    def open(self) -> tuple[str, ...]:
        """Names of the groups with more than one choice, in order."""
        return tuple(name for name, choices in self.choices.items() if len(choices) > 1)

    @cached_property
    def quantized(self) -> dict[str, set[str]]:
        """Names of the groups that may leave BF16, with those of their formats."""
        return {
            name: {str(choice.format) for choice in choices if choice != BF16}
            for name, choices in self.choices.items()
            if choices != (BF16,)
        }


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Ordered rules; the first that matches a group decides, and without one it stays BF16."""

    name: str
    description: str
    shared_experts: SharedExperts
    rules: tuple[Rule, ...]

    def with_bf16_inputs(self) -> Self:
        """The space with each choice that would quantize its input beside one that does not."""
        return replace(self, rules=tuple(map(_with_bf16_inputs, self.rules)))

    def options(self, groups: Groups) -> Options:
        """Apply the space to the groups of a model."""
        choices: dict[str, tuple[Choice, ...]] = {}
        closed: dict[str, dict[Format, str]] = {}
        used: set[int] = set()
        for group in groups:
            number = next((n for n, rule in enumerate(self.rules) if rule.matches(group)), None)
            if number is not None:
                used.add(number)
            rule = self.rules[number] if number is not None else None
            closed[group.name] = self._why_closed(group, rule)
            legal = tuple(
                choice
                for choice in (rule.choices_of(group) if rule else ())
                if choice.format not in closed[group.name]
            )
            if not legal:
                closed[group.name].pop(BF16.format, None)
            choices[group.name] = legal or (BF16,)
        return Options(choices=choices, closed=closed, warnings=self._without_effect(used))

    def _why_closed(self, group: LayerGroup, rule: Rule | None) -> dict[Format, str]:
        reasons: dict[Format, str] = {}
        for format in all_formats():
            illegal = group.why_illegal(format)
            if illegal is not None:
                reasons[format] = illegal
            elif rule is None:
                if format != BF16.format:
                    reasons[format] = self._unnamed(group)
            elif all(choice.format != format for choice in rule.choices):
                reasons[format] = rule.reason or f"closed by the space {self.name}"
        return reasons

    def _unnamed(self, group: LayerGroup) -> str:
        if group.role in LEFT_ROLES:
            return f"{LEFT_ROLES[group.role]}, and the space {self.name} does not name it"
        return f"no rule of the space {self.name} names the group"

    def _without_effect(self, used: set[int]) -> tuple[str, ...]:
        return tuple(
            f"space {self.name}: rules[{number}] ({', '.join(rule.match)}) has no effect: "
            "no group matches it that an earlier rule has not taken."
            for number, rule in enumerate(self.rules)
            if number not in used and not rule.only_protects
        )


def _keeps(group: LayerGroup, choice: Choice) -> bool:
    return choice.format.name == group.casts_to


def _with_bf16_inputs(rule: Rule) -> Rule:
    added = [
        replace(choice, input=A16)
        for choice in rule.choices
        if choice.input is None and A16 in choice.format.inputs
    ]
    choices = dict.fromkeys((*rule.choices, *added))
    by_size = sorted(choices, key=lambda choice: choice.format.weight_bits)
    return replace(rule, choices=tuple(by_size))
