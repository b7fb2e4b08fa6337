"""The copy of a model with its channels scaled, written whole or not at all."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from autoquant.equalize.channels import Powers, by_tensor
from autoquant.equalize.sites import Site
from autoquant.errors import SourceError
from autoquant.export.companions import companion_files
from autoquant.export.layouts.base import StoredTensor
from autoquant.export.target import copy_file, new_folder
from autoquant.export.writer import ShardWriter
from autoquant.files import to_json, write_atomic
from autoquant.progress import Progress, Unit
from autoquant.source.headers import TensorHeader, by_file
from autoquant.source.shards import INDEX_FILE
from autoquant.source.source import CONFIG_FILE, Source
from autoquant.source.tensors import read_tensor

EQUALIZATION = "equalization.json"
"""Says what a copy was made from, and by which powers of two: int8 exponents in base64."""

_CARD = "README.md"


@contextmanager
def new_copy(
    target: Path,
    source: Source,
    sites: Sequence[Site],
    powers: Sequence[Tensor],
    said: Mapping[str, Any],
    progress: Progress,
) -> Iterator[Path]:
    """Write the copy beside `target`, whose place it takes when the block ends well.

    Args:
        target: a new folder.
        source: all of its tensors are stored as they are computed with.
        sites: whose channels are scaled.
        powers: exponents of each, int8 [K].
        said: of the copy, besides.
        progress: told of bytes.

    Raises:
        SourceError: a tensor cannot be read, or not be scaled without loss.
        ConfigError: `target` cannot be written.
        RunConflict: `target` holds something.
    """
    scaled = by_tensor(sites, powers)
    headers = source.headers
    progress.stage("write", sum(tensor.bytes for tensor in headers), Unit.BYTES)
    with new_folder(target, source=source.path) as folder:
        for file, own in by_file(headers).items():
            _write_file(folder / file.name, own, headers.metadata[file], scaled, progress)
        for name in _others(source.path):
            copy_file(source.path / name, folder / name)
        content = dict(said) | {"sites": [*map(_said_of, sites, powers)]}
        write_atomic(folder / EQUALIZATION, to_json(content))
        yield folder


def _write_file(
    path: Path,
    tensors: Sequence[TensorHeader],
    metadata: Mapping[str, str],
    scaled: Mapping[str, Powers],
    progress: Progress,
) -> None:
    stored = [StoredTensor(name=own.name, dtype=own.dtype, shape=own.shape) for own in tensors]
    with ShardWriter(path, stored, metadata) as writer:
        for tensor in tensors:
            powers = scaled.get(tensor.name)
            if powers is None:
                writer.copy(tensor)
            else:
                writer.put(tensor.name, _scaled(tensor, powers))
            progress.step(tensor.bytes)


def _scaled(tensor: TensorHeader, powers: Powers) -> Tensor:
    try:
        return powers.scaled(read_tensor(tensor))
    except ValueError as error:
        raise SourceError(
            f"{tensor.name} cannot be scaled without loss: {error}.",
            fix="search the model as it is.",
        ) from error


def _others(folder: Path) -> Iterator[Path]:
    """What a model has beside its weights."""
    yield from companion_files(folder)[0]
    for name in (CONFIG_FILE, INDEX_FILE, _CARD):
        if (folder / name).is_file():
            yield Path(name)


def _said_of(site: Site, powers: Tensor) -> dict[str, Any]:
    return {
        "part": str(site.part),
        "name": site.name,
        "rows": [*site.rows],
        "columns": [*site.columns],
        "powers": base64.b64encode(powers.numpy().tobytes()).decode(),
    }
