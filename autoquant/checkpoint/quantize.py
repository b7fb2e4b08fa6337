"""From source weights to the tensors that the exported checkpoint stores."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import autoquant_kernels as kernels
import torch
from torch import Tensor

from autoquant.assignment import Assignment
from autoquant.checkpoint.headers import Headers, TensorHeader
from autoquant.checkpoint.layout_modelopt import GLOBAL_SCALE, INPUT_SCALE, WEIGHT_SCALE
from autoquant.checkpoint.tensors import read_tensor
from autoquant.errors import SourceError
from autoquant.formats import Choice, Format
from autoquant.groups import LayerGroup, Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLinear:
    """A linear that leaves BF16, with the scalars that it shares with others."""

    linear: Linear
    choice: Choice
    weight_amax: float
    """Largest magnitude over the weights of its scale set."""
    input_amax: float
    """Largest magnitude over the calibration inputs of its scale set."""

    def tensors(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors by name.

        Args:
            weight: [out_features, in_features], BF16.
        """
        name, tensor = self.linear.name, self.linear.tensor
        if self.choice.format is Format.FP8:
            scale = kernels.fp8_scale(self.weight_amax)
            return {
                tensor: kernels.quantize_fp8(weight, scale),
                name + WEIGHT_SCALE: scale,
                name + INPUT_SCALE: kernels.fp8_scale(self.input_amax),
            }
        assert self.choice.scale_rule is not None
        scale = kernels.nvfp4_global_scale(self.weight_amax, self.choice.scale_rule)
        codes, block_scale = kernels.quantize_nvfp4(weight, scale, rule=self.choice.scale_rule)
        return {
            tensor: codes,
            name + WEIGHT_SCALE: block_scale,
            name + GLOBAL_SCALE: scale,
            name + INPUT_SCALE: kernels.nvfp4_global_scale(self.input_amax),
        }


def read_weight(header: TensorHeader) -> Tensor:
    """A source weight in BF16, which is the precision that it is scored in."""
    return read_tensor(header).to(torch.bfloat16)


def weight_ranges(
    headers: Headers,
    groups: Iterable[LayerGroup],
    assignment: Assignment,
    on_bytes: Callable[[int], None],
) -> dict[str, float]:
    """Largest weight magnitude of every scale set that the assignment quantizes.

    Raises:
        SourceError: a weight is NaN or infinite.
    """
    ranges: dict[str, float] = {}
    for group in groups:
        if assignment[group.name].format is Format.BF16:
            continue
        for linear in group.linears:
            header = headers[linear.tensor]
            lowest, highest = torch.aminmax(read_weight(header))
            largest = torch.maximum(-lowest, highest)
            if not torch.isfinite(largest):
                raise SourceError(
                    f"{header.name} in {header.file.name} holds NaN or Inf.",
                    fix="repair or download the model again; such a weight has no scale.",
                )
            known = ranges.get(linear.weight_scale_set, 0.0)
            ranges[linear.weight_scale_set] = max(known, largest.item())
            on_bytes(header.bytes)
    return ranges


def input_ranges(
    groups: Iterable[LayerGroup], assignment: Assignment, observed: Mapping[str, float]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Largest input magnitude of every quantized input set, and the sets that were not observed.

    What no calibration token reached takes the largest magnitude of its layer, or of the model if
    nothing in the layer was observed.

    Raises:
        SourceError: an observed magnitude is NaN, infinite or negative, or there is none at all.
    """
    for name, amax in observed.items():
        if not 0 <= amax < float("inf"):
            raise SourceError(
                f"calibration gave the input of {name} the largest magnitude {amax}.",
                fix="calibrate again on text that the model reads without overflow.",
            )
    layer_of = {linear.input_scale_set: group.layer for group in groups for linear in group.linears}
    in_layer: dict[int | None, float] = {}
    for name, amax in observed.items():
        layer = layer_of.get(name)
        in_layer[layer] = max(amax, in_layer.get(layer, 0.0))
    used = dict.fromkeys(
        linear.input_scale_set
        for group in groups
        if assignment[group.name].format is not Format.BF16
        for linear in group.linears
    )
    if used and not observed:
        raise SourceError(
            "no input magnitude was observed, and quantized layers store an input scale.",
            fix="calibrate the model first.",
        )
    missing = tuple(name for name in used if name not in observed)
    largest = max(observed.values(), default=0.0)
    ranges = {name: observed.get(name, in_layer.get(layer_of[name]) or largest) for name in used}
    return ranges, missing
