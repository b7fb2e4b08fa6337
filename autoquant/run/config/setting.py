"""What a setting says of itself, and what its field tells those who show or check it."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from autoquant.decimals import shortest

Heading = Literal["Model", "Budget", "Search", "Data", "Tasks", "Tracking", "Output"]

HEADINGS: tuple[Heading, ...] = get_args(Heading)
"""Headed groups of settings, in the order of `--help` and of a settings file."""

_NOUNS = {bool: "yes or no", int: "integer", float: "number", Path: "path"}

_BOUNDS = {
    "greater_than": ("gt", "x>"),
    "greater_than_equal": ("ge", "x>="),
    "less_than": ("lt", "x<"),
    "less_than_equal": ("le", "x<="),
}
"""Pydantic's name for a broken bound: the bound's own name, and the rule as it is written."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a field of a configuration says besides its type, bounds and default.

    It stands in the field's `Annotated`. The option of the command line, its help, and whether a
    settings file may hold the field follow from it.
    """

    heading: Heading
    help: str
    metavar: str | None = None
    """What stands for the value in `--help`; the choices unless told."""
    unset: str | None = None
    """What holds where nothing is given, in words; the default itself unless told."""
    opposite: str | None = None
    """The flag that says no, of a setting that is yes or no."""
    is_argument: bool = False
    """Whether the command line takes it by its place instead of by a flag."""
    is_secret: bool = False
    """Whether it may carry a password, which is left out of every command that is shown."""
    is_saved: bool = True
    """Whether a settings file may hold it; not what concerns one call."""

    def __post_init__(self) -> None:
        if self.heading not in HEADINGS:
            raise ValueError(f"heading {self.heading!r} is none of {HEADINGS}")


@dataclass(frozen=True, slots=True)
class SettingField:
    """A field of a configuration by its name."""

    name: str
    info: FieldInfo

    @property
    def setting(self) -> Setting:
        """What it says of itself."""
        return next(part for part in self.info.metadata if isinstance(part, Setting))

    @property
    def flag(self) -> str:
        """What the command line calls it."""
        dashed = self.name.replace("_", "-")
        return self.name.upper() if self.setting.is_argument else f"--{dashed}"

    @property
    def kind(self) -> Any:
        """The type of a value that is given: bool, int, float, str, Path, tuple or an enum."""
        bare = self._bare
        return str if get_origin(bare) is Literal else get_origin(bare) or bare

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it may take, where they can be listed."""
        bare = self._bare
        if get_origin(bare) is Literal:
            return tuple(map(str, get_args(bare)))
        is_enum = isinstance(bare, type) and issubclass(bare, Enum)
        return tuple(map(str, bare)) if is_enum else ()

    @property
    def _bare(self) -> Any:
        """Its type without `None` and without metadata."""
        return next(part for part in _parts(self.info.annotation) if _is_type(part))

    @property
    def bounds(self) -> str:
        """The range of its values, `x>=32`, or nothing."""
        written = [
            f"{relation}{shortest(bound)}"
            for part in [*_parts(self.info.annotation), *self.info.metadata]
            for name, relation in _BOUNDS.values()
            if (bound := getattr(part, name, None)) is not None
        ]
        return ", ".join(written)

    def rule(self, error: ErrorDetails) -> str:
        """The value that pydantic refused, and the rule that it breaks."""
        value, kind = error["input"], error["type"]
        if kind == "value_error":
            return str(error["ctx"]["error"])
        if kind == "missing":
            return "it is missing"
        if isinstance(value, (list, tuple, dict, set)):
            return f"{value!r}: it takes a single value"
        if kind in _BOUNDS:
            bound, relation = _BOUNDS[kind]
            return f"{value} is not in the range {relation}{shortest(error['ctx'][bound])}"
        if kind == "finite_number":
            return f"{value} is not a finite number"
        return self.not_valid(value)

    def not_valid(self, value: Any) -> str:
        """What is wrong with a value of another type, or with one that is no choice."""
        if self.choices:
            return f"{value!r} is not one of {', '.join(map(repr, self.choices))}"
        if self.kind is str:
            return f"{value!r} is no text; put it in quotes"
        return f"{value!r} is not a valid {_NOUNS.get(self.kind, 'value')}"


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield the types and the metadata that an annotation is made of."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    elif isinstance(annotation, FieldInfo):
        yield from annotation.metadata
    else:
        yield annotation


def _is_type(part: Any) -> bool:
    return part is not type(None) and (isinstance(part, type) or get_origin(part) is not None)
