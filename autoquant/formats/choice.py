"""A choice: a format with everything that is free at its bits."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from autoquant.errors import ConfigError
from autoquant.formats.base import A16, NEAREST, Format
from autoquant.formats.registry import all_formats, find_format


@dataclass(frozen=True, slots=True)
class Choice:
    """What one layer group may take.

    Written `bf16`, `fp8`, `nvfp4/mse`, `nvfp4/mse/a16`: the format, then what differs from its
    defaults. A scale rule is always written.

    Raises:
        ConfigError: the format has no such scale rule, rounding or input.
    """

    format: Format
    scale_rule: str | None = None
    """How the block scales of a weight are chosen; None for a format without block scales."""
    rounding: str = NEAREST
    """How codes are chosen."""
    input: str | None = None
    """`a16`: the input stays in BF16 whatever the target quantizes; None: the format's own."""

    def __post_init__(self) -> None:
        known = self.format
        for value, allowed, what in (
            (self.scale_rule, known.scale_rules or (None,), "scale rule"),
            (self.rounding, known.roundings, "rounding"),
            (self.input, known.inputs, "input"),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"{known} has no {what} {value!r}; it has {', '.join(map(str, allowed))}.",
                    fix=f"write {_spellings()}.",
                )

    def __str__(self) -> str:
        rounding = None if self.rounding == NEAREST else self.rounding
        parts = (str(self.format), self.scale_rule, rounding, self.input)
        return "/".join(str(part) for part in parts if part is not None)

    @property
    def form(self) -> str:
        """What a checkpoint declares, and people count: the format, and `a16` where it differs."""
        return f"{self.format}/{self.input}" if self.input else str(self.format)

    @property
    def keeps_input(self) -> bool:
        """Whether the input stays in BF16 on every machine."""
        return self.input == A16 or not self.format.quantizes_input

    def is_finer_than(self, other: Self) -> bool:
        """Whether it keeps more of the model in every respect, so that only noise says otherwise.

        More bits a weight and no fewer an input; or the same weight and more bits an input.
        """
        weight, others = self.format.weight_bits, other.format.weight_bits
        if weight > others:
            return self.input_bits >= other.input_bits
        return self.of_weight == other.of_weight and self.input_bits > other.input_bits

    @property
    def of_weight(self) -> Self:
        """The choice of the same codes with the format's own input."""
        return self if self.input is None else replace(self, input=None)

    @property
    def input_bits(self) -> int:
        """Bits an input element is multiplied in where the machine quantizes it."""
        return 16 if self.keeps_input else self.format.input_bits

    @classmethod
    def parse(cls, text: str) -> Self:
        """The choice that `str` writes; what is left out is the format's default.

        Raises:
            ConfigError: no such format, scale rule, rounding or input.
        """
        return cls._parsed(text, defaults=True)[0]

    @classmethod
    def parse_all(cls, text: str, scale_rules: Iterable[str] | None = None) -> list[Self]:
        """Every choice that `text` stands for in a search space.

        Args:
            text: as for `parse`; a scale rule that is left out stands for all of `scale_rules`.
            scale_rules: those that the space allows; all of the format by default.

        Raises:
            ConfigError: as for `parse`.
        """
        found = cls._parsed(text, defaults=False)
        if scale_rules is None:
            return found
        allowed = (*scale_rules, *text.split("/")[1:], None)
        return [choice for choice in found if choice.scale_rule in allowed]

    @classmethod
    def _parsed(cls, text: str, *, defaults: bool) -> list[Self]:
        name, *words = text.split("/")
        found = find_format(name)
        if found is None:
            raise ConfigError(f"{text!r} is not a format.", fix=f"use {_spellings()}.")
        rules = [word for word in words if word in found.scale_rules]
        roundings = [word for word in words if word in found.roundings]
        inputs = [word for word in words if word in found.inputs]
        if len(words) != len(set(words)) or max(map(len, (rules, roundings, inputs))) > 1:
            raise ConfigError(f"{text!r} says something twice.", fix=f"use {_spellings()}.")
        unknown = [word for word in words if word not in {*rules, *roundings, *inputs}]
        if unknown:
            raise ConfigError(
                f"{text!r} is not a choice: {found} has no {unknown[0]!r}.",
                fix=f"use {_spellings()}.",
            )
        every: list[str | None] = list(rules or found.scale_rules) or [None]
        of_input: list[str | None] = list(inputs) or [None]
        return [
            cls(found, rule, (roundings or [NEAREST])[0], of_input[0])
            for rule in (every[:1] if defaults else every)
        ]


def choices_of(format: Format) -> tuple[Choice, ...]:
    """Every choice that a format allows, its default first."""
    axes = (format.scale_rules or (None,), format.roundings, format.inputs)
    return tuple(Choice(format, *axis) for axis in itertools.product(*axes))


def _spellings() -> str:
    """How choices are written, for the way out of an error."""
    names = [str(choice) for format in all_formats() for choice in choices_of(format)]
    return ", ".join(dict.fromkeys((*map(str, all_formats()), *names)))
