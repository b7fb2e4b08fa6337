"""What commands print: the result on standard output, everything else on standard error."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from autoquant.errors import one_line
from autoquant.files import to_json

SCHEMA_VERSION = 1

_LOGGERS = ("autoquant", "autoquant_kernels")
"""What both packages log to; other libraries' logs are their own."""


def print_json(result: Mapping[str, Any]) -> None:
    """Print `result` as one JSON object on standard output, with its schema version."""
    click.echo(to_json({"schema_version": SCHEMA_VERSION, **result}, indent=2))


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns on standard output; columns of numbers are flush right."""
    cells = [[one_line(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [
        bool(cells) and all(_is_number(row[index]) for row in cells) for index in range(len(header))
    ]
    for row in ([*header], *cells):
        line = "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        click.echo(line.rstrip())


def print_fields(fields: Mapping[str, object]) -> None:
    """Print one `name  value` a line on standard output, values aligned."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        click.echo(f"{name.ljust(width)}  {one_line(str(value))}")


def figure(value: float | None, format: str) -> str:
    """The number in a format, or a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:{format}}"


def note(message: str) -> None:
    """Print a line for the user on standard error."""
    click.echo(one_line(message), err=True)


def warn(message: str) -> None:
    """Print a line on standard error that says what went wrong without ending the command."""
    click.echo(f"warning: {one_line(message)}", err=True)


class _Shown(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


@contextmanager
def showing_warnings() -> Iterator[None]:
    """Print what the packages log as a warning, inside, as every other warning is printed."""
    handler = _Shown(logging.WARNING)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").rstrip("%"))
    except ValueError:
        return text in {"", "-"}
    return True
