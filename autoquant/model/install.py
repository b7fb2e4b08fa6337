"""Put an exported checkpoint into a live model: its weights and its input scales as stored."""

from collections.abc import Iterable, Mapping

import torch

from autoquant.errors import SourceError
from autoquant.export.read_back import QuantizedCheckpoint
from autoquant.formats import BF16, Choice
from autoquant.model.inputs import InputScale
from autoquant.model.live import QuantizedModel
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import Groups, find_groups
from autoquant.plan.linears import LayerGroup
from autoquant.source.source import Source
from autoquant.source.tensors import read_tensor


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
    _require_same_rest(checkpoint, source)
    for group in quantized.groups:
        if assignment[group.name] != BF16:
            codes = {linear.name: checkpoint.packed(linear.name) for linear in group.linears}
            quantized.book.give(group, assignment[group.name], codes)
    return assignment


def groups_of(checkpoint: QuantizedCheckpoint, source: Source) -> Groups:
    """The layer groups of `source`, shared experts apart where the checkpoint stores them so."""
    groups = find_groups(source)
    if all(len(_choices(checkpoint, group)) == 1 for group in groups):
        return groups
    return find_groups(source, shared_experts="separate")


def is_quantized(checkpoint: QuantizedCheckpoint, group: LayerGroup) -> bool:
    """Whether some linear of the group left BF16."""
    return _choices(checkpoint, group) != {BF16}


def _require_same_rest(checkpoint: QuantizedCheckpoint, source: Source) -> None:
    """Raise unless what is not quantized is the source's."""
    for header in checkpoint.source_headers:
        if header.name.removesuffix(".weight") in checkpoint.choices:
            continue
        stored = read_tensor(checkpoint.headers[header.name])
        if not torch.equal(stored, read_tensor(source.headers[header.name])):
            raise _foreign(checkpoint, source, f"{header.name}, which is not quantized, differs")


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


def _choices(checkpoint: QuantizedCheckpoint, group: LayerGroup) -> set[Choice]:
    return {checkpoint.choice(linear.name) for linear in group.linears}


def _choice(checkpoint: QuantizedCheckpoint, group: LayerGroup) -> Choice:
    choices = _choices(checkpoint, group)
    if len(choices) > 1:
        raise SourceError(
            f"{checkpoint.path}: the linears of {group.name} are stored in "
            f"{', '.join(sorted(choice.form for choice in choices))}.",
            fix="engines fuse them: export the checkpoint again.",
        )
    return choices.pop()


def _scales(
    checkpoint: QuantizedCheckpoint, groups: Iterable[LayerGroup]
) -> Iterable[tuple[str, InputScale]]:
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
            yield linear.input_scale_set, InputScale(stored=scale)
