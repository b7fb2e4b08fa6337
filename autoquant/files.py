"""Files that are whole or absent, and JSON that every reader accepts."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any


def to_json(data: Any, *, indent: int | None = None) -> str:
    """JSON text of `data`; numbers that JSON lacks (NaN, infinities) become null."""
    return json.dumps(_finite(data), indent=indent, ensure_ascii=False, allow_nan=False)


def json_number(value: float) -> float | str:
    """`value` as a JSON value that `read_number` reads back: what JSON lacks goes by name.

    The names are those of the JSON mapping of Protocol Buffers: "NaN", "Infinity", "-Infinity".
    """
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"


def read_number(stored: float | str | None) -> float:
    """What `json_number` wrote. Null, which stood for all three before, is NaN.

    Raises:
        ValueError: a text that names no number.
    """
    return math.nan if stored is None else float(stored)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader, also after a power cut, sees the old file or the new one."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path`, whole and on the disk, when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def set_aside(path: Path) -> Path:
    """Rename `path` to its name with the time appended, which is returned."""
    aside = path.with_name(f"{path.name}.{datetime.now(UTC):%Y%m%dT%H%M%S.%f}")
    path.rename(aside)
    return aside


def sync_folder(folder: Path) -> None:
    """Make the folder's entries as durable as the files in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
