"""Put an exported checkpoint into a live model: its weights and its input scales as stored."""

from collections.abc import Iterable

from autoquant.assignment import Assignment
from autoquant.checkpoint.quantized import QuantizedCheckpoint
from autoquant.errors import SourceError
from autoquant.formats import BF16, FP8, NVFP4, Choice, Format
from autoquant.groups import LayerGroup
from autoquant.model.inputs import InputScales
from autoquant.model.quantized import QuantizedModel

_CHOICES = {Format.NVFP4: NVFP4, Format.FP8: FP8}
"""The scale rule cannot be read off a checkpoint, and does not matter to who loads it."""


def install(checkpoint: QuantizedCheckpoint, quantized: QuantizedModel) -> Assignment:
    """Let the model multiply with the checkpoint's dequantized weights.

    Returns:
        The assignment to apply; its scale rules are nominal.

    Raises:
        SourceError: a group whose linears differ in format or in their input scale.
    """
    assignment = Assignment.of({g.name: _choice(checkpoint, g) for g in quantized.groups})
    quantized.set_input_scales(dict(_scales(checkpoint, quantized.groups)))
    names = {linear.tensor for group in quantized.groups for linear in group.linears}
    weights = {name: tensor for name, tensor in checkpoint.tensors() if name in names}
    quantized.set_weights(weights, assignment)
    return assignment


def _choice(checkpoint: QuantizedCheckpoint, group: LayerGroup) -> Choice:
    formats = {checkpoint.formats.get(linear.name, Format.BF16) for linear in group.linears}
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
