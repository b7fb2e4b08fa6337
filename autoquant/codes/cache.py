"""Codes on disk: those that cost more to make than to read, such as compensated rounding.

A file holds the codes of one group under one choice, linear by linear, whatever units a source
holds them in. Its name is a digest of everything that they were made from, so that a wrong code
cannot be found; its content is held against checksums, so that a damaged one is made again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from autoquant.codes.tensor_files import SUFFIX, TensorFile, read_tensors, write_tensors
from autoquant.formats import Choice
from autoquant.formats.packed import Packed

VERSION = 3
"""Raised when codes would be made otherwise from the same weights and statistics."""

MOST_CODES_BYTES = 1 << 38
"""Of a run directory: one choice of every weight of a model of 400 billion parameters."""


@dataclass(frozen=True, slots=True)
class LinearCodes:
    """Codes of linears by name."""

    packed: Mapping[str, Packed]
    plain: Mapping[str, str] = field(default_factory=dict)
    """All linears of their group that have plain rounding where the choice has another, and why."""


class CodeCache:
    """A folder of codes, within a bound of bytes.

    Args:
        folder: created when something is written.
        made_from: digest of the source that codes are made from.
        most_bytes: of all files together; the one read or written longest ago goes first.
    """

    def __init__(self, folder: Path, *, made_from: str, most_bytes: int) -> None:
        self.folder = folder
        self._made_from = made_from
        self._most_bytes = most_bytes

    def read(
        self, group: str, choice: Choice, statistics: str, linears: Iterable[str]
    ) -> LinearCodes | None:
        """Codes of some linears of a group; None where one is absent or damaged.

        Args:
            group: its name.
            choice: of the codes.
            statistics: digest of the statistics that they rest on.
            linears: their names.
        """
        path = self._path(group, choice, statistics)
        found = read_tensors(path, linears)
        if found is None:
            return None
        with suppress(OSError):  # of a run that may only be read
            os.utime(path)
        packed = {name: Packed(choice, parts) for name, parts in found.entries.items()}
        return LinearCodes(packed, found.facts)

    def write(self, group: str, choice: Choice, statistics: str, codes: LinearCodes) -> None:
        """Keep the codes of a group; what does not fit the bound is not kept."""
        entries = {name: packed.parts for name, packed in codes.packed.items()}
        content = TensorFile(entries, codes.plain).content()
        if len(content) <= self._most_bytes:
            self._make_room(len(content))
            write_tensors(self._path(group, choice, statistics), content)

    def _path(self, group: str, choice: Choice, statistics: str) -> Path:
        key = json.dumps([VERSION, self._made_from, statistics, group, str(choice)])
        return self.folder / (hashlib.sha256(key.encode()).hexdigest() + SUFFIX)

    def _make_room(self, size: int) -> None:
        files = sorted(
            (file.stat().st_mtime_ns, file.stat().st_size, file) for file in self._files()
        )
        total = sum(length for _, length, _ in files) + size
        for _, length, file in files:
            if total <= self._most_bytes:
                return
            file.unlink(missing_ok=True)
            total -= length

    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [file for file in self.folder.iterdir() if file.suffix == SUFFIX]
