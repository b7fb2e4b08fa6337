"""Put an exported checkpoint into a live model: its weights and its input scales as stored."""

from collections.abc import Iterable, Mapping

import torch

from autoquant.errors import SourceError
from autoquant.export.read_back import QuantizedCheckpoint
from autoquant.formats import BF16, FP8, NVFP4, Choice, Format
from autoquant.model.inputs import InputScales
from autoquant.model.live import QuantizedModel
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import Groups, find_groups
from autoquant.plan.linears import LayerGroup
from autoquant.source.source import Source
from autoquant.source.tensors import read_tensor

_CHOICES = {Format.NVFP4: NVFP4, Format.FP8: FP8}
"""The scale rule cannot be read off a checkpoint, and does not matter to who loads it."""


def install(
    checkpoint: QuantizedCheckpoint, source: Source, quantized: QuantizedModel
) -> Assignment:
    """Let the model multiply with the checkpoint's dequantized weights.

    Args:
        checkpoint: an export of `source`.
        source: what the model in memory was loaded from.
        quantized: the live model, with every group that the checkpoint quantizes and every
            attention module that it has scales for.

    Returns:
        The assignment to apply; its scale rules are nominal.

    Raises:
        SourceError: the checkpoint is no export of `source`, or the linears of a group differ in
            format or in their input scale.
    """
    _require_same_tensors(checkpoint, source)
    assignment = Assignment.of({g.name: _choice(checkpoint, g) for g in quantized.groups})
    quantized.set_input_scales(dict(_scales(checkpoint, quantized.groups)))
    if quantized.kv_cache is not None:
        quantized.kv_cache.set_scales(checkpoint.kv_scales)
    names = {linear.tensor for group in quantized.groups for linear in group.linears}
    weights = {}
    for name, tensor in checkpoint.tensors():
        if name in names:
            weights[name] = tensor
        elif not torch.equal(tensor, read_tensor(source.headers[name])):
            raise _foreign(checkpoint, source, f"{name}, which is not quantized, differs")
    quantized.set_weights(weights, assignment)
    return assignment


def groups_of(checkpoint: QuantizedCheckpoint, source: Source) -> Groups:
    """The layer groups of `source`, shared experts apart where the checkpoint stores them so."""
    groups = find_groups(source)
    if all(len(_formats(checkpoint, group)) == 1 for group in groups):
        return groups
    return find_groups(source, shared_experts="separate")


def is_quantized(checkpoint: QuantizedCheckpoint, group: LayerGroup) -> bool:
    """Whether some linear of the group left BF16."""
    return _formats(checkpoint, group) != {Format.BF16}


def _require_same_tensors(checkpoint: QuantizedCheckpoint, source: Source) -> None:
    stored = {name: header.shape for name, header in checkpoint.source_headers.tensors.items()}
    wanted = {name: header.shape for name, header in source.headers.tensors.items()}
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            shapes = f"{name} is {_shape(stored, name)} there and {_shape(wanted, name)} here"
            raise _foreign(checkpoint, source, shapes)


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"


def _foreign(checkpoint: QuantizedCheckpoint, source: Source, how: str) -> SourceError:
    return SourceError(
        f"{checkpoint.path} was not exported from {source.model}: {how}.",
        fix="pass the model that it was made from.",
    )


def _formats(checkpoint: QuantizedCheckpoint, group: LayerGroup) -> set[Format]:
    return {checkpoint.formats.get(linear.name, Format.BF16) for linear in group.linears}


def _choice(checkpoint: QuantizedCheckpoint, group: LayerGroup) -> Choice:
    formats = _formats(checkpoint, group)
    if len(formats) > 1:
        raise SourceError(
            f"{checkpoint.path}: the linears of {group.name} are stored in "
            f"{', '.join(sorted(formats))}.",
            fix="engines fuse them: export the checkpoint again.",
        )
    return _CHOICES.get(formats.pop(), BF16)


def _scales(
    checkpoint: QuantizedCheckpoint, groups: Iterable[LayerGroup]
) -> Iterable[tuple[str, InputScales]]:
    found: dict[str, float] = {}
    for group in groups:
        for linear in group.linears:
            scale = checkpoint.input_scales.get(linear.name)
            if scale is None:
                continue
            if found.setdefault(linear.input_scale_set, scale) != scale:
                raise SourceError(
                    f"{checkpoint.path}: {linear.name} does not share its input_scale with the "
                    "linears that read the same input.",
                    fix="engines fuse them: export the checkpoint again.",
                )
            yield linear.input_scale_set, InputScales(nvfp4=scale, fp8=scale)
