"""Export: the source checkpoint with the assigned linears quantized, streamed tensor by tensor."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

import autoquant
from autoquant.codes.book import CodeBook
from autoquant.codes.weights import FileWeights
from autoquant.export.card import CardFacts, Served, model_card
from autoquant.export.companions import AUTOQUANT_FILE, companion_files
from autoquant.export.declaration import declare, exported_config, quantized_linears
from autoquant.export.fitted import said_of_codes
from autoquant.export.inputs import input_ranges
from autoquant.export.kv_scales import kv_scales
from autoquant.export.layouts.base import Layout, StoredTensor, stored_tensors, to_store
from autoquant.export.pipeline import ahead
from autoquant.export.target import copy_file, new_folder
from autoquant.export.writer import ShardWriter
from autoquant.files import to_json, write_atomic
from autoquant.formats import BF16, Choice
from autoquant.formats.kv_cache import KvCache
from autoquant.plan.assignment import Assignment, require_legal
from autoquant.plan.grouping import Groups
from autoquant.plan.kv_cache import KvRange
from autoquant.plan.linears import LayerGroup, Linear
from autoquant.source.contents import file_digests
from autoquant.source.headers import TensorHeader, by_file
from autoquant.source.shards import INDEX_FILE, SINGLE_FILE
from autoquant.source.source import CONFIG_FILE, Source

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What was written."""

    path: Path
    checkpoint_bytes: int
    """Data of every tensor, the files' own headers excluded."""
    bpe: float
    """Bits per element of the source, scope `checkpoint`."""
    uncalibrated: tuple[str, ...]
    """Stored input scales of which no calibration token reached the inputs."""
    left_out: tuple[Path, ...]
    """Files of the source with weights in another form, or with some that no index names."""


def export(
    source: Source,
    groups: Groups,
    assignment: Assignment,
    input_amax: Mapping[str, float],
    target: Path,
    *,
    layout: Layout = Layout.MODELOPT,
    kv_ranges: Mapping[str, KvRange] | None = None,
    uncalibrated: Collection[str] = (),
    book: CodeBook | None = None,
    card: CardFacts | None = None,
    evidence: Mapping[str, Any] | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> ExportResult:
    """Write `source` under `assignment` to the new folder `target`.

    Everything that the assignment does not name is copied byte for byte. Peak memory is a few times
    the largest tensor. The folder appears when it is complete.

    Args:
        source: what to quantize; it is only read.
        groups: the layer groups of `source`.
        assignment: groups that it lacks stay as they are.
        input_amax: largest calibration input magnitude of each input scale set.
        target: a folder that does not exist yet, or an empty one.
        layout: who is to read it.
        kv_ranges: largest calibrated keys and values of each attention module, for an FP8 cache;
            without them engines keep their cache in BF16.
        uncalibrated: input scale sets that no calibration token reached.
        book: where codes come from; made from the files of `source` by default.
        card: what the model card says beyond the formats.
        evidence: what scoring has measured on a few tokens, for another forward to be held against.
        on_bytes: called with the number of source bytes whose export has just been written; they
            add up to the size of the source.

    Raises:
        ConfigError: a group or format that the model does not allow, or `target` inside `source`.
        SourceError: a NaN or infinite weight, a useless input magnitude, a source that changed.
        RunConflict: `target` holds something, or another process is writing it.
    """
    require_legal(assignment, groups)
    inputs = input_ranges(groups, assignment, input_amax)
    choices = quantized_linears(groups, assignment)
    kv_cache = KvCache.of(quantized=bool(kv_ranges))
    declared = declare(layout, source.headers, groups, choices, kv_cache)
    codes = _Codes(
        book=book or CodeBook(FileWeights(source.headers), memory_bytes=0),
        layout=layout,
        inputs=inputs,
        linears={
            linear.tensor: (group, linear, assignment[group.name])
            for group in groups
            if assignment[group.name] != BF16
            for linear in group.linears
        },
    )
    companions, left_out = companion_files(source.path)
    with new_folder(target, source=source.path) as folder:
        added = kv_scales(kv_ranges or {}, layout)
        weights = _write_shards(source, codes, added, folder, on_bytes)
        for name in companions:
            copy_file(source.path / name, folder / name)
        result = ExportResult(
            path=target.absolute(),
            checkpoint_bytes=weights.bytes,
            bpe=8 * weights.bytes / source.headers.elements,
            uncalibrated=tuple(name for name in inputs if name in uncalibrated),
            left_out=tuple(n for n in left_out if source.path / n not in source.headers.files),
        )
        served = Served(layout=layout, choices=choices, kv_cache=kv_cache)
        files = dict(declared.files) if declared else {}
        files[CONFIG_FILE] = exported_config(source.config, declared)
        files[AUTOQUANT_FILE] = _provenance(
            source, groups, assignment, result, weights, served, card, evidence
        )
        files[AUTOQUANT_FILE] |= said_of_codes(groups, assignment, codes.book)
        text = model_card(source, groups, assignment, result.bpe, served, card)
        write_atomic(folder / "README.md", text)
        for file, content in (files | weights.index).items():  # the index last
            text = to_json(content, indent=2, is_config=file == CONFIG_FILE)
            write_atomic(folder / file, text)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Codes:
    """What takes the place of the source's tensors."""

    book: CodeBook
    layout: Layout
    inputs: Mapping[str, float]
    """Largest calibration input of each set that stores a scale."""
    linears: Mapping[str, tuple[LayerGroup, Linear, Choice]]
    """The quantized linears, by their tensor in the source."""

    def announced(self, tensor: str) -> Iterable[StoredTensor]:
        """Names, dtypes and shapes of what is stored for a tensor."""
        _, linear, choice = self.linears[tensor]
        return stored_tensors(linear, choice, self.layout).values()

    def tensors(self, tensor: str) -> dict[str, Tensor]:
        """What is stored for a tensor."""
        group, linear, choice = self.linears[tensor]
        packed = self.book.linear(group, linear, choice)
        amax = self.inputs.get(linear.input_scale_set, 0.0)
        return to_store(linear, packed, choice, amax, self.layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """The weight files that were written."""

    placed: dict[str, str]
    """The file of each tensor."""
    digests: dict[str, str]
    """SHA-256 of each file."""
    bytes: int
    """Data of every tensor."""

    @property
    def index(self) -> dict[str, dict[str, Any]]:
        """The content of the index by its name; nothing where there is one file."""
        if set(self.placed.values()) == {SINGLE_FILE}:
            return {}
        return {INDEX_FILE: {"metadata": {"total_size": self.bytes}, "weight_map": self.placed}}


def _write_shards(
    source: Source,
    codes: _Codes,
    added: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    on_bytes: Callable[[int], None],
) -> _Weights:
    """Write every weight file; a thread reads it back for its digest, while the system has it
    cached and the next one is written.
    """
    placed: dict[str, str] = {}
    size = 0
    streamed = ahead(_quantized_tensors(source, codes))
    headers = by_file(source.headers.to_write(codes.linears))
    with ThreadPoolExecutor(1, thread_name_prefix="digests") as thread:
        written = []
        for file, parts in groupby(streamed, key=lambda part: part[0].file):
            stored = [t for header in headers[file] for t in _announce(header, codes, added)]
            metadata = source.headers.metadata[file]
            with ShardWriter(folder / file.name, stored, metadata) as shard:
                for header, tensors in parts:
                    if tensors is None:
                        shard.copy(header)
                    else:
                        for name, tensor in tensors.items():
                            shard.put(name, tensor)
                    for name, tensor in added.get(header.name, {}).items():
                        shard.put(name, tensor)
                    on_bytes(header.bytes)
            placed |= dict.fromkeys((tensor.name for tensor in stored), file.name)
            written.append(thread.submit(file_digests, [folder / file.name]))
            size += shard.data_bytes
        digests = {name: own for done in written for name, own in done.result().items()}
    return _Weights(placed=placed, digests=digests, bytes=size)


def _quantized_tensors(
    source: Source, codes: _Codes
) -> Iterator[tuple[TensorHeader, dict[str, Tensor] | None]]:
    """Every tensor of the source in file order with what is stored for it, None for itself."""
    for header in source.headers.to_write(codes.linears):
        is_quantized = header.name in codes.linears
        yield header, codes.tensors(header.name) if is_quantized else None


def _announce(
    header: TensorHeader, codes: _Codes, added: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[StoredTensor]:
    """What is written for a tensor of the source: itself or its quantized form, and additions."""
    if header.name in codes.linears:
        yield from codes.announced(header.name)
    else:
        yield StoredTensor(name=header.name, dtype=header.dtype, shape=header.shape)
    for name, tensor in added.get(header.name, {}).items():
        yield StoredTensor(name=name, dtype="F32", shape=tuple(tensor.shape))


def _provenance(
    source: Source,
    groups: Groups,
    assignment: Assignment,
    result: ExportResult,
    weights: _Weights,
    served: Served,
    card: CardFacts | None,
    evidence: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What autoquant.json says: enough to make the checkpoint again and to check it."""
    complete = Assignment.of({group.name: assignment[group.name] for group in groups})
    return {
        "schema_version": SCHEMA_VERSION,
        "autoquant_version": autoquant.__version__,
        "layout": str(served.layout),
        "kv_cache": str(served.kv_cache),
        "base_model": source.hub_id,
        "revision": source.revision,
        "source_digest": source.digest,
        "source_elements": source.headers.elements,
        "checkpoint_bytes": result.checkpoint_bytes,
        "sha256": weights.digests,
        "bpe": result.bpe,
        "assignment": complete.to_dict()["groups"],
        "uncalibrated_inputs": list(result.uncalibrated),
        "measured": card.to_dict() if card is not None else None,
        "forward": evidence,
    }
