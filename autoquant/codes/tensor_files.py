"""Files of tensors that are whole, or taken for absent: written at once, read against checksums."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from autoquant.errors import SourceError
from autoquant.files import replacing
from autoquant.source.headers import Headers
from autoquant.source.tensors import read_tensor

SUFFIX = ".safetensors"
_SAID = "autoquant"
"""The one entry of a file's metadata: the order of several would change from file to file."""
_CHECKSUMS, _FACTS, _OF_BOTH = "sha256", "facts", "sha256 of both"


@dataclass(frozen=True, slots=True)
class TensorFile:
    """Entries of several tensors each, by their names."""

    entries: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else is known of entries, by their names; complete whichever of them were read."""

    def content(self) -> bytes:
        """The file."""
        moved = {
            name: {part: _by_itself(tensor) for part, tensor in own.items()}
            for name, own in self.entries.items()
        }
        flat = {_joined(name, part): t for name, own in moved.items() for part, t in own.items()}
        checksums = {name: _checksum(own) for name, own in moved.items()}
        said = {_CHECKSUMS: checksums, _FACTS: dict(self.facts)}
        return save(flat, {_SAID: json.dumps(said | {_OF_BOTH: _digest(said)})})


def write_tensors(path: Path, content: bytes) -> None:
    """Write a `TensorFile`'s content whole, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)


def read_tensors(path: Path, names: Iterable[str]) -> TensorFile | None:
    """Some entries of a file; None where one of them is absent or damaged.

    They are read, not mapped: a file that is cut off under a mapping ends the process.
    """
    opened = _open(path)
    if opened is None:
        return None
    headers, said = opened
    parts: dict[str, list[str]] = {}
    for key in headers.tensors:
        parts.setdefault(key.rpartition(":")[0], []).append(key)
    entries: dict[str, dict[str, Tensor]] = {}
    for name in names:
        try:
            own = {k.rpartition(":")[2]: read_tensor(headers[k]) for k in parts.get(name, [])}
        except SourceError:
            return None
        if said[_CHECKSUMS].get(name) != _checksum(own):
            return None
        entries[name] = own
    return TensorFile(entries, said[_FACTS])


def names_in(path: Path) -> tuple[str, ...]:
    """The entries of a file; none of one that cannot be opened."""
    opened = _open(path)
    return () if opened is None else tuple(opened[1][_CHECKSUMS])


def digest_of(path: Path, names: Iterable[str]) -> str | None:
    """A digest of some entries by their checksums; None where the file cannot be opened, or lacks
    one.
    """
    opened = _open(path)
    if opened is None:
        return None
    checksums = opened[1][_CHECKSUMS]
    own = {name: checksums.get(name) for name in names}
    return None if None in own.values() else _digest(own)


def _open(path: Path) -> tuple[Headers, dict[str, dict[str, str]]] | None:
    """The file's tensors, its checksums and its facts; None where it is absent or damaged."""
    try:
        headers = Headers.read((path,))
        said = json.loads(headers.metadata[path].get(_SAID, "null"))
    except (SourceError, ValueError):
        return None
    if not isinstance(said, dict) or said.pop(_OF_BOTH, None) != _digest(said):
        return None
    return headers, said


def _digest(said: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _by_itself(tensor: Tensor) -> Tensor:
    """On the host, and no scalar in another's memory: entries share theirs, and a file cannot."""
    found = tensor.detach().cpu().contiguous()
    return found if found.ndim else found.clone()


def _joined(name: str, part: str) -> str:
    return f"{name}:{part}"


def _checksum(parts: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name, part in sorted(parts.items()):
        content.update(f"{name} {part.dtype} {tuple(part.shape)}\n".encode())
        content.update(part.reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
