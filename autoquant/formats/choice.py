"""A choice: a format with everything that is free at its bits."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from autoquant.errors import ConfigError
from autoquant.formats.base import A16, CAST, NEAREST, REFIT, Format
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
        if self.scale_rule == CAST and self.rounding != NEAREST:
            raise ConfigError(
                f"{known} has no rounding {self.rounding!r} under the scale rule {CAST!r}, which "
                "keeps codes.",
                fix=f"write {known}/{CAST}.",
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
    def is_cast(self) -> bool:
        """Whether codes of the source are kept."""
        return self.scale_rule == CAST

    @property
    def of_weight(self) -> Self:
        """The choice of the same codes with the format's own input."""
        return self if self.input is None else replace(self, input=None)

    @property
    def plain(self) -> Self:
        """The choice of nearest codes of the weight alone that stands in for these."""
        nearest = replace(self, rounding=NEAREST)
        if self.format.needs_moments(nearest):
            return replace(nearest, scale_rule=self.format.scale_rules[0])
        return nearest

    @property
    def refitted(self) -> Self:
        """The choice of refitted codes in the place of these; itself where there are none.

        Codes of the source stay: refitted ones would be others.
        """
        has_refit = REFIT in self.format.roundings and not self.is_cast
        return replace(self, rounding=REFIT) if has_refit else self

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
        format, rule, rounding, of_input = _words(text)
        default = format.scale_rules[0] if format.scale_rules else None
        return cls(format, rule or default, rounding or NEAREST, of_input)

    @classmethod
    def parse_all(cls, text: str, ways: Iterable[tuple[str | None, str]]) -> list[Self]:
        """Every choice that `text` stands for in a search space.

        Args:
            text: as for `parse`; a scale rule or a rounding that is left out stands for those of
                the space beside what is said, or for all rules where there are none.
            ways: scale rules, None for formats without one, and roundings of the space, which
                formats may lack.

        Raises:
            ConfigError: as for `parse`.
        """
        format, rule, rounding, of_input = _words(text)
        if not format.scale_rules:
            return [cls(format, None, rounding or NEAREST, of_input)]
        known = [
            (own, way) for own, way in ways if own in format.scale_rules and way in format.roundings
        ]
        found = [
            (own, way) for own, way in known if rule in (None, own) and rounding in (None, way)
        ]
        if not found:
            rules = [rule] if rule else [*dict.fromkeys(own for own, _ in known)]
            found = [(own, rounding or NEAREST) for own in rules or format.scale_rules[:1]]
        return [cls(format, own, way, of_input) for own, way in found]


def _words(text: str) -> tuple[Format, str | None, str | None, str | None]:
    """Format, scale rule, rounding and input that a text says, None for what it leaves out.

    Raises:
        ConfigError: no such format, scale rule, rounding or input.
    """
    name, *words = text.split("/")
    format = find_format(name)
    if format is None:
        raise ConfigError(f"{text!r} is not a format.", fix=f"use {_spellings()}.")
    axes: tuple[tuple[str | None, ...], ...]
    axes = format.scale_rules, format.roundings, format.inputs
    said = [[word for word in words if word in axis] for axis in axes]
    unknown = [word for word in words if not any(word in axis for axis in axes)]
    if unknown:
        raise ConfigError(
            f"{text!r} is not a choice: {format} has no {unknown[0]!r}.",
            fix=f"use {_spellings()}.",
        )
    if max(map(len, said)) > 1:
        raise ConfigError(f"{text!r} says something twice.", fix=f"use {_spellings()}.")
    rule, rounding, of_input = (own[0] if own else None for own in said)
    return format, rule, rounding, of_input


def choices_of(format: Format) -> tuple[Choice, ...]:
    """Every choice that a format allows, its default first."""
    axes = (format.scale_rules or (None,), format.roundings, format.inputs)
    return tuple(
        Choice(format, rule, rounding, of_input)
        for rule, rounding, of_input in itertools.product(*axes)
        if rule != CAST or rounding == NEAREST
    )


def _spellings() -> str:
    """How choices are written, for the way out of an error."""
    return ", ".join(map(_spelling, all_formats()))


def _spelling(format: Format) -> str:
    rules = [rule for rule in format.scale_rules if rule is not None]
    axes = rules, format.roundings[1:], format.inputs[1:]
    return "".join((str(format), *(f"[/{'|'.join(map(str, axis))}]" for axis in axes if axis)))
