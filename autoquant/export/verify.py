"""Verification: every tensor of an exported checkpoint read back and held against its rules."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoquant.errors import SourceError, one_line
from autoquant.export.companions import AUTOQUANT_FILE, companion_problems
from autoquant.export.fitted import FittedCheck
from autoquant.export.json_files import (
    config_problems,
    declaration_problems,
    provenance_problems,
    read_provenance,
)
from autoquant.export.kv_scales import kv_scale_tensors
from autoquant.export.layouts.base import Layout
from autoquant.export.nearest import distance_of
from autoquant.export.read_back import QuantizedCheckpoint, open_quantized
from autoquant.formats import BF16, GLOBAL_SCALE, INPUT_SCALE, NEAREST, SCALE, all_formats
from autoquant.formats.kv_cache import KvCache
from autoquant.plan.linears import LayerGroup
from autoquant.source.source import DIGEST_KIND, Source
from autoquant.source.tensors import read_tensor

SCHEMA_VERSION = 1
_WEIGHT = ".weight"
_OLDER_DIGEST = (
    f"{AUTOQUANT_FILE} names its source by a digest of an earlier version, which covers samples of "
    "the weights and cannot be compared; the tensors themselves were."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What reading a checkpoint back has shown."""

    path: Path
    layout: Layout
    kv_cache: KvCache
    """What engines are told to keep keys and values in."""
    problems: tuple[str, ...]
    """One line each; none if nothing is wrong."""
    notes: tuple[str, ...]
    """What could not be told, one line each; none of it is a problem."""
    is_foreign: bool
    """Whether the source that was given is not the one that the checkpoint says it was made from;
    its problems then say little of damage."""
    tensors: int
    linears: dict[str, int]
    """Linears by format, of those that belong to a layer group."""
    checkpoint_bytes: int
    bpe: float
    """Bits per element of the source that the checkpoint stands for."""
    relative_error: dict[str, float]
    """Largest ‖W - dequantized‖ / ‖W‖ of a linear by format; empty without a source."""

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "schema_version": SCHEMA_VERSION,
            "path": str(self.path),
            "layout": str(self.layout),
            "kv_cache": str(self.kv_cache),
            "ok": self.ok,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "is_foreign": self.is_foreign,
            "tensors": self.tensors,
            "linears": self.linears,
            "checkpoint_bytes": self.checkpoint_bytes,
            "bpe": self.bpe,
            "relative_error": self.relative_error,
        }


def verify(
    folder: str | Path,
    source: Source | None = None,
    *,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Verification:
    """Read every tensor of an exported checkpoint back.

    Args:
        folder: what `export` has written.
        source: the model that it was made from; with it, untouched tensors must be identical,
            every code must be the nearest that its scale allows, and config.json, tokenizer,
            templates and settings of generation must be the source's. Codes that were fitted to
            inputs are held against their statistics, where the checkpoint lies in its run
            directory.
        on_bytes: called with the number of checkpoint bytes that have just been read.

    Raises:
        SourceError: the checkpoint cannot be opened at all: files or tensors missing, truncated, or
            of the wrong shape.
    """
    checkpoint = open_quantized(folder)
    errors: dict[str, float] = {}
    notes: list[str] = []
    problems = [
        *_scale_problems(checkpoint),
        *_sharing_problems(checkpoint),
        *declaration_problems(checkpoint, notes),
        *provenance_problems(checkpoint),
        *companion_problems(
            checkpoint.path, checkpoint.headers.files, None if source is None else source.path
        ),
    ]
    is_foreign = False if source is None else _is_foreign(checkpoint, source)
    if is_foreign is None:
        notes.append(_OLDER_DIGEST)
    if source is not None:
        if is_foreign:
            problems.append(f"{AUTOQUANT_FILE} names another source than {source.path}.")
        problems += config_problems(checkpoint, source)
        problems += _name_problems(checkpoint, source)
    fitted = None if source is None else _fitted_check(checkpoint, source)
    problems += _content_problems(checkpoint, source, fitted, errors, on_bytes)
    if fitted is not None:
        notes += fitted.notes()
    counts = Counter(checkpoint.choice(linear.name).form for linear in checkpoint.groups.linears)
    return Verification(
        path=checkpoint.path,
        layout=checkpoint.layout,
        kv_cache=KvCache.of(quantized=bool(checkpoint.attention)),
        problems=tuple(map(one_line, problems)),
        notes=tuple(notes),
        is_foreign=bool(is_foreign),
        tensors=len(checkpoint.headers),
        linears=dict.fromkeys(map(str, all_formats()), 0) | counts,
        checkpoint_bytes=checkpoint.headers.bytes,
        bpe=8 * checkpoint.headers.bytes / checkpoint.source_headers.elements,
        relative_error=errors,
    )


def _scale_problems(checkpoint: QuantizedCheckpoint) -> Iterator[str]:
    scalars = [end for name in checkpoint.choices for end in checkpoint.scalars(name).values()]
    for module in checkpoint.attention:
        scalars += [tensor.name for tensor in kv_scale_tensors(module, checkpoint.layout)]
    for tensor in scalars:
        value = checkpoint.stored_scalar(tensor).item()
        if not 0 < value < float("inf"):
            yield f"{tensor} is {value}; a scale is positive and finite."


def _sharing_problems(checkpoint: QuantizedCheckpoint) -> Iterator[str]:
    """Differences inside groups and scale sets, which engines hold as one matrix."""
    for group in checkpoint.groups:
        forms = {checkpoint.choice(linear.name).form for linear in group.linears}
        if len(forms) > 1:
            stored = " and ".join(sorted(forms))
            yield f"{group.name} is stored in {stored}; its linears share one format."
        elif forms != {BF16.form}:
            yield from _unequal_scalars(checkpoint, group)


def _unequal_scalars(checkpoint: QuantizedCheckpoint, group: LayerGroup) -> Iterator[str]:
    first: dict[tuple[str, str], tuple[str, torch.Tensor]] = {}
    for part in (GLOBAL_SCALE, SCALE, INPUT_SCALE):
        for linear in group.linears:
            tensor = checkpoint.scalars(linear.name).get(part)
            if tensor is None:
                continue
            of_input = part == INPUT_SCALE
            scale_set = linear.input_scale_set if of_input else linear.weight_scale_set
            value = checkpoint.stored_scalar(tensor)
            other, expected = first.setdefault((scale_set, part), (tensor, value))
            if not torch.equal(value, expected):
                yield f"{tensor} is {value.item()} and {other} {expected.item()}; they share."


def _is_foreign(checkpoint: QuantizedCheckpoint, source: Source) -> bool | None:
    """Whether the checkpoint says that it was exported from another model than `source`.

    None where it names its source by a digest that cannot be compared.
    """
    provenance = read_provenance(checkpoint)
    if provenance is None:
        return False
    said = provenance.get("source_digest")
    if isinstance(said, str) and not said.startswith(DIGEST_KIND):
        return None
    return bool(said != source.digest)


def _name_problems(checkpoint: QuantizedCheckpoint, source: Source) -> Iterator[str]:
    ours = checkpoint.source_headers.tensors
    for header in source.headers:
        if header.name not in ours:
            yield f"{header.name} of the source is missing."
        elif ours[header.name].shape != header.shape:
            yield (
                f"{header.name} stands for {list(ours[header.name].shape)}, "
                f"and the source has {list(header.shape)}."
            )
    for name in ours:
        if name not in source.headers:
            yield f"{name} is not in the source."


def _fitted_check(checkpoint: QuantizedCheckpoint, source: Source) -> FittedCheck:
    said = read_provenance(checkpoint) or {}
    run = checkpoint.path.absolute().parent
    return FittedCheck(run, said, checkpoint.groups, source.digest)


def _content_problems(
    checkpoint: QuantizedCheckpoint,
    source: Source | None,
    fitted: FittedCheck | None,
    errors: dict[str, float],
    on_bytes: Callable[[int], None],
) -> Iterator[str]:
    for header in checkpoint.source_headers:
        name = header.name.removesuffix(_WEIGHT)
        if source is not None and (
            header.name not in source.headers or source.headers[header.name].shape != header.shape
        ):
            continue
        if name in checkpoint.choices:
            yield from _code_problems(checkpoint, name, source, fitted, errors)
        else:
            yield from _untouched_problems(checkpoint, header.name, source)
        on_bytes(header.bytes)


def _code_problems(
    checkpoint: QuantizedCheckpoint,
    name: str,
    source: Source | None,
    fitted: FittedCheck | None,
    errors: dict[str, float],
) -> Iterator[str]:
    packed = checkpoint.packed(name)
    for part, tensor in packed.parts.items():
        if tensor.dtype is not torch.float8_e4m3fn:
            continue
        if (tensor.view(torch.uint8) & 0x7F == 0x7F).any():
            yield f"{name} holds an E4M3 NaN."
            return
        if part == SCALE and bool((tensor.float() <= 0).any()):
            yield f"{name} holds a block scale that is not positive."
            return
    if source is None:
        return
    weight = read_tensor(source.headers[name + _WEIGHT]).to(torch.bfloat16)
    distance = distance_of(weight, packed)
    form = packed.choice.form
    errors[form] = max(distance.relative_error, errors.get(form, 0.0))
    choice = packed.choice
    if fitted is not None and name in fitted.choices:
        choice = fitted.choices[name]
        yield from fitted.problems(weight, packed, name)
    if choice.rounding == NEAREST and distance.wrong:
        yield (
            f"{name}: {distance.wrong} of {weight.numel()} codes are not the nearest to the source "
            f"(relative error {distance.relative_error:.3f})."
        )


def _untouched_problems(
    checkpoint: QuantizedCheckpoint, name: str, source: Source | None
) -> Iterator[str]:
    stored = read_tensor(checkpoint.headers[name])
    if source is None:
        if stored.is_floating_point() and not stored.float().isfinite().all():
            yield f"{name} holds NaN or Inf."
        return
    original = read_tensor(source.headers[name])
    same_bytes = stored.dtype == original.dtype and torch.equal(
        stored.reshape(-1).view(torch.uint8), original.reshape(-1).view(torch.uint8)
    )
    if not same_bytes:
        yield f"{name} was to stay as it is, and differs from the source."


def require_sound(verification: Verification) -> None:
    """Return if no problem was found.

    Raises:
        SourceError: the checkpoint is damaged, or another source's.
    """
    if verification.is_foreign:
        raise SourceError(
            f"{verification.path} cannot be held against this model: {AUTOQUANT_FILE} names "
            "another source.",
            fix="name the model that it was exported from with --source, or leave --source out.",
        )
    if not verification.ok:
        raise SourceError(
            f"{verification.path} is damaged: {len(verification.problems)} problems, first: "
            f"{verification.problems[0]}",
            fix="export it again from its assignment.",
        )
