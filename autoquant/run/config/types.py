"""Types of settings that check more than a type: budgets and paths."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from autoquant.decimals import shortest

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base ** (power + 1)
    for power, letter in enumerate("kmgt")
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>([kmgt]i?)?b|)", re.IGNORECASE)


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"File {str(path)!r} does not exist")
    return path


def _no_folder(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"File {str(path)!r} is a directory")
    return path


def _no_file(path: Path) -> Path:
    if path.is_file():
        raise ValueError(f"Directory {str(path)!r} is a file")
    return path


def _bits(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        given = value.strip() if isinstance(value, str) else value
        raise ValueError(f"{given!r} is not a valid budget") from None


def _size(value: Any) -> int:
    """Bytes of `40GiB`, `40GB`, `512 MiB`, or of a number of bytes."""
    match = _SIZE.fullmatch(str(value).strip())
    if match is None or isinstance(value, bool):
        raise ValueError(f"{value!r} is no size, such as 40GiB, 512MiB or 40GB")
    return int(float(match["number"]) * _UNITS[match["unit"].lower()])


def _one_budget(value: Any) -> Any:
    if isinstance(value, str) and "," in value:
        raise ValueError(f"{value!r} has a comma: this command takes one budget, such as 5.5")
    return _bits(value) if isinstance(value, str) else value


def _budgets(value: Any) -> tuple[float, ...]:
    if isinstance(value, str):
        return tuple(map(_bits, value.split(",")))
    values = value if isinstance(value, Sequence) else [value]
    if any(isinstance(part, (list, tuple, dict, bool)) for part in values):
        raise ValueError(f"{value!r}: it takes a budget or a list of single values")
    if not values:
        raise ValueError(f"{value!r} is not a valid budget")
    return tuple(map(_bits, values))


def _names(value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{value!r}: it takes a name or a list of names")
    found = tuple(part.strip() for part in parts)
    if not found or not all(found):
        raise ValueError(f"{value!r} has a name that is empty")
    if len(set(found)) < len(found):
        raise ValueError(f"{','.join(found)!r} names one of them twice")
    return found


def _distinct(budgets: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(budgets)) < len(budgets):
        raise ValueError(f"'{','.join(map(shortest, budgets))}' names a budget twice")
    return budgets


ExistingFile = Annotated[Path, AfterValidator(_existing_file)]
NewFile = Annotated[Path, AfterValidator(_no_folder)]
Folder = Annotated[Path, AfterValidator(_no_file)]

Bits = Annotated[float, BeforeValidator(_one_budget), Field(gt=0)]
"""A budget, bits per element."""

Budgets = Annotated[
    tuple[Annotated[float, Field(gt=0)], ...],
    BeforeValidator(_budgets),
    AfterValidator(_distinct),
]
"""Budgets, bits per element: one, a list, or a text with commas."""

Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
"""Names: one, a list, or a text with commas."""

Bytes = Annotated[int, BeforeValidator(_size), Field(ge=1)]
"""A size, bytes: a number, or a text with a unit."""

Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Tokens = Annotated[int, Field(ge=32)]
Seconds = Annotated[float, Field(gt=0)]
Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
