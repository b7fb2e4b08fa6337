"""The formats that are known, by name."""

from collections.abc import Iterator
from contextlib import contextmanager

from autoquant.formats.base import Format

_FORMATS: dict[str, Format] = {}


def register(format: Format) -> Format:
    """Make a format known under its name; returns it.

    Raises:
        ValueError: another format has the name.
    """
    if _FORMATS.setdefault(format.name, format) is not format:
        raise ValueError(f"a format named {format.name!r} is registered already")
    return format


@contextmanager
def registered(format: Format) -> Iterator[Format]:
    """A format that is known for the time of a `with` block."""
    try:
        yield register(format)
    finally:
        _FORMATS.pop(format.name, None)


def all_formats() -> tuple[Format, ...]:
    """Every format, fewest bits a weight first."""
    return tuple(sorted(_FORMATS.values(), key=lambda format: (format.weight_bits, format.name)))


def find_format(name: str) -> Format | None:
    """The format of that name, or None."""
    return _FORMATS.get(name)
