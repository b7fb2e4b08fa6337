"""Codes on disk: those that cost more to make than to read, such as compensated rounding.

A file holds the codes of one unit under one choice. Its name is a digest of everything that they
were made from, so that a wrong code cannot be found; its content is held against a checksum when
it is read, so that a damaged one is made again.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from autoquant.files import replacing
from autoquant.formats import Choice
from autoquant.formats.packed import Packed

VERSION = 1
"""Raised when codes would be made otherwise from the same weights and statistics."""

MOST_CODES_BYTES = 1 << 38
"""Of a run directory: one choice of every weight of a model of 400 billion parameters."""

_SUFFIX = ".safetensors"
_CHECKSUM = "sha256"
_EXPERTS = "experts"


class CodeCache:
    """A folder of codes, within a bound of bytes.

    Args:
        folder: created when something is written.
        made_from: digest of the source and of the statistics that codes are made from.
        most_bytes: of all files together; the one read or written longest ago goes first.
    """

    def __init__(self, folder: Path, *, made_from: str, most_bytes: int) -> None:
        self.folder = folder
        self._made_from = made_from
        self._most_bytes = most_bytes

    def read(self, unit: str, choice: Choice) -> Packed | None:
        """The codes of a unit; None where there are none or where they are damaged."""
        path = self._path(unit, choice)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            os.utime(path)
        except (OSError, SafetensorError):
            return None
        if metadata.get(_CHECKSUM) != _checksum(parts):
            return None
        experts = metadata.get(_EXPERTS)
        return Packed(choice, parts, int(experts) if experts else None)

    def write(self, unit: str, packed: Packed) -> None:
        """Keep the codes of a unit; what does not fit the bound is not kept."""
        parts = {name: part.detach().cpu().contiguous() for name, part in packed.parts.items()}
        metadata = {_CHECKSUM: _checksum(parts)}
        if packed.experts is not None:
            metadata[_EXPERTS] = str(packed.experts)
        content = save(parts, metadata)
        if len(content) > self._most_bytes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(len(content))
        with replacing(self._path(unit, packed.choice)) as file:
            file.write(content)

    def _path(self, unit: str, choice: Choice) -> Path:
        key = json.dumps([VERSION, self._made_from, unit, str(choice)])
        return self.folder / (hashlib.sha256(key.encode()).hexdigest() + _SUFFIX)

    def _make_room(self, size: int) -> None:
        files = sorted(
            ((file.stat().st_mtime_ns, file.stat().st_size, file) for file in self._files()),
        )
        total = sum(length for _, length, _ in files) + size
        for _, length, file in files:
            if total <= self._most_bytes:
                return
            file.unlink(missing_ok=True)
            total -= length

    def _files(self) -> list[Path]:
        return [file for file in self.folder.iterdir() if file.suffix == _SUFFIX]


def _checksum(parts: dict[str, torch.Tensor]) -> str:
    content = hashlib.sha256()
    for name, part in sorted(parts.items()):
        content.update(f"{name} {part.dtype} {tuple(part.shape)}\n".encode())
        content.update(part.reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
