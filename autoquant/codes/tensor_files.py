"""Files of tensors that are whole, or taken for absent: written at once, read against checksums."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from autoquant.files import replacing

SUFFIX = ".safetensors"
_SAID = "autoquant"
"""The one entry of a file's metadata: the order of several would change from file to file."""
_CHECKSUMS, _FACTS = "sha256", "facts"


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
        return save(flat, {_SAID: json.dumps(said)})


def write_tensors(path: Path, content: bytes) -> None:
    """Write a `TensorFile`'s content whole, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)


def read_tensors(path: Path, names: Iterable[str]) -> TensorFile | None:
    """Some entries of a file; None where one of them is absent or damaged."""
    entries: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            said = _said_by(file)
            checksums, facts = said[_CHECKSUMS], said[_FACTS]
            parts: dict[str, list[str]] = {}
            for key in file.keys():  # noqa: SIM118
                parts.setdefault(key.rpartition(":")[0], []).append(key)
            for name in names:
                own = {k.rpartition(":")[2]: file.get_tensor(k) for k in parts.get(name, [])}
                if checksums.get(name) != _checksum(own):
                    return None
                entries[name] = own
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return TensorFile(entries, facts)


def digest_of(path: Path) -> str | None:
    """A digest of all entries by their checksums; None for a file that cannot be opened."""
    try:
        with safe_open(path, framework="pt") as file:
            checksums = json.dumps(_said_by(file)[_CHECKSUMS], sort_keys=True)
            return hashlib.sha256(checksums.encode()).hexdigest()
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _said_by(file: Any) -> Any:
    return json.loads((file.metadata() or {})[_SAID])


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
