"""Files that are whole or absent, what a kill leaves of them, and JSON that readers accept."""

import errno
import glob
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

MARK = ".autoquant-export"
"""Marks an unfinished folder as ours; the lock of who writes it."""

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_TEMPORARY = re.compile(r"\..+\.(?P<process>\d+)\.tmp(-journal|-wal|-shm)?", re.DOTALL)
"""The endings are SQLite's."""
_UNFINISHED = re.compile(r"\..+\.unfinished", re.DOTALL)


def to_json(data: Any, *, indent: int | None = None, is_config: bool = False) -> str:
    """JSON text of `data`; numbers that JSON lacks (NaN, infinities) become null.

    Half of a surrogate pair, as a file name that is not UTF-8 has it, is written as its escape.

    Args:
        data: JSON types.
        indent: spaces a level; one line without.
        is_config: whether it is a model's config.json, where transformers writes and reads
            `Infinity`, as in `time_step_limit` of Mamba 2.
    """
    kept = data if is_config else _finite(data)
    text = json.dumps(kept, indent=indent, ensure_ascii=False, allow_nan=is_config)
    return text.encode(errors="backslashreplace").decode()


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
    """Write `text` so that a reader, also after a power cut, sees the old file or the new one.

    What a killed process has left of the same file is removed.
    """
    for entry in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if _TEMPORARY.fullmatch(entry.name):
            _remove(entry)
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path`, whole and on the disk, when the block ends well."""
    unfinished = temporary(path)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):  # what went wrong first is what counts
            unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def temporary(path: Path) -> Path:
    """Name beside `path` for what this process has not finished."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def unfinished_folder(path: Path) -> Path:
    """Name beside the folder `path` for what it is made in; who makes it holds the lock `MARK`."""
    return path.with_name(f".{path.name}.unfinished")


def is_litter(entry: Path) -> bool:
    """Whether `entry` is unfinished work of ours: a living process's, or what a kill has left."""
    if _TEMPORARY.fullmatch(entry.name):
        return True
    if not _UNFINISHED.fullmatch(entry.name) or not entry.is_dir():
        return False
    return (entry / MARK).exists() or not any(entry.iterdir())


def clear_litter(folder: Path) -> None:
    """Remove unfinished work of ours from `folder` as far as nobody is at it."""
    for entry in filter(is_litter, list(folder.iterdir())):
        _remove(entry)


def _remove(litter: Path) -> None:
    """Remove unfinished work unless somebody is at it; what stays blocks nobody."""
    from filelock import FileLock, Timeout

    named = _TEMPORARY.fullmatch(litter.name)
    with suppress(OSError, Timeout):
        if named is not None:
            if _has_ended(int(named["process"])):
                litter.rmdir() if litter.is_dir() else litter.unlink()
        elif (litter / MARK).exists():
            with FileLock(litter / MARK, timeout=0):
                shutil.rmtree(litter)
        else:
            litter.rmdir()


def _has_ended(process: int) -> bool:
    """Whether no other process has this id. That of a container's first process returns."""
    if process == os.getpid():
        return True
    if os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # somebody else's
        return False
    return False


def is_full(error: OSError) -> bool:
    """Whether the disk, or a limit on it, has no room left."""
    return error.errno in _NO_ROOM


def link_files(source: Path, target: Path) -> None:
    """Give a folder the files of another that it has not: links, where the file system has such.

    Args:
        source: of files that are replaced when they change, and never written into.
        target: made if need be.
    """
    for file in sorted(source.iterdir()):
        if file.is_symlink() or not file.is_file() or is_litter(file):
            continue
        with suppress(OSError):  # what is not there is made again
            target.mkdir(parents=True, exist_ok=True)
            os.link(file, target / file.name)


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
