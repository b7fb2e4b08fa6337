"""JSON objects with a schema version and a checksum: whole files, and lines of a log.

A line file survives a kill in the middle of a line: a torn last line was never written.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autoquant.errors import SourceError
from autoquant.files import sync_folder, to_json
from autoquant.parsing import Unreadable, read_bytes

SCHEMA_VERSION = 1

CHECKSUM = "checksum"
"""Of what else the object holds."""

VERSION = "schema_version"

_LARGEST_FILE = 2**32
"""Bytes; more than any search writes."""


class OtherSchema(SourceError):
    """A file of a run directory that another version of AutoQuant wrote.

    Args:
        origin: the file, or a line of it.
        version: the schema version found.
    """

    def __init__(self, origin: str, version: object) -> None:
        super().__init__(
            f"{origin} has schema_version {version!r}, this version reads {SCHEMA_VERSION}.",
            fix="use the version of AutoQuant that wrote it, or start anew with --fresh.",
        )
        self.version = version


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with its schema version and its checksum."""
    own = {key: value for key, value in data.items() if key != VERSION}
    return {VERSION: SCHEMA_VERSION, **own, CHECKSUM: _checksum(own)}


def read_content(path: Path) -> bytes | None:
    """The content of a file; None where there is none.

    Raises:
        SourceError: no regular file.
        OSError: it cannot be read.
    """
    try:
        return read_bytes(path, most=_LARGEST_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Unreadable as error:
        raise damaged(str(path), str(error)) from error


def parse_object(content: bytes, origin: str) -> dict[str, Any]:
    """A JSON object as it is written.

    Raises:
        SourceError: it is none.
    """
    try:
        data = json.loads(content.decode())
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise damaged(origin, "is not a JSON object")
    return data


def unsealed(data: dict[str, Any], origin: str, *, is_sealed: bool) -> dict[str, Any]:
    """What was given to `sealed`; `data` is changed.

    Args:
        data: what was read.
        origin: where.
        is_sealed: whether it must have a checksum.

    Raises:
        SourceError: damaged, or of another schema version.
    """
    version = data.pop(VERSION, None)
    if version != SCHEMA_VERSION:
        raise OtherSchema(origin, version)
    checksum = data.pop(CHECKSUM, None)
    if (is_sealed or checksum is not None) and checksum != _checksum(data):
        raise damaged(origin, "is not what was written there, by its checksum")
    return data


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a line file; it is on the disk when this returns."""
    is_new = not path.exists()
    line = to_json(sealed(record)) + "\n"
    with path.open("ab") as file:
        file.truncate(_whole_lines(path))
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_folder(path.parent)


def read_lines(
    path: Path, *, is_sealed: bool, is_foreign: Callable[[Mapping[str, Any]], bool] | None = None
) -> list[dict[str, Any]]:
    """What `append_line` wrote, in order, without a torn last line.

    Args:
        path: the line file; one that is absent has no lines.
        is_sealed: whether every line must have a checksum.
        is_foreign: whether others may have written a line, which is left out.

    Raises:
        SourceError: a line is damaged or of another schema version.
    """
    found = []
    for number, line in enumerate((read_content(path) or b"").split(b"\n")[:-1], start=1):
        origin = f"{path} line {number}"
        data = parse_object(line, origin)
        if is_foreign is None or not is_foreign(data):
            found.append(unsealed(data, origin, is_sealed=is_sealed))
    return found


def damaged(origin: str, why: str) -> SourceError:
    """The error of a damaged file; `why` ends the sentence that says so."""
    return SourceError(
        f"{origin} is damaged: it {why}.",
        fix="start anew with --fresh (the earlier run is set aside), or restore the file.",
    )


def _checksum(data: Mapping[str, Any]) -> str:
    """The same for what is written and for what is read back: keys keep their order."""
    return hashlib.sha256(to_json(data).encode()).hexdigest()[:16]


def _whole_lines(path: Path) -> int:
    """Bytes up to and including the last newline."""
    return path.read_bytes().rfind(b"\n") + 1
