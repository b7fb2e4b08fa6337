"""From source weights to the tensors that the exported checkpoint stores."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import autoquant_kernels as kernels
import torch
from torch import Tensor

from autoquant.errors import SourceError
from autoquant.export.layouts.base import Layout, tensor_names
from autoquant.formats import Choice, Format
from autoquant.plan.assignment import Assignment
from autoquant.plan.linears import LayerGroup, Linear
from autoquant.source.headers import Headers, TensorHeader
from autoquant.source.tensors import read_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLinear:
    """A linear that leaves BF16, with the scalars that it shares with others."""

    linear: Linear
    choice: Choice
    input_amax: float
    """Largest magnitude over the calibration inputs of its scale set."""
    layout: Layout

    def tensors(self, weight: Tensor, weight_amax: float) -> dict[str, Tensor]:
        """The stored tensors by name.

        Args:
            weight: [out_features, in_features], BF16.
            weight_amax: largest magnitude over the weights of its scale set.
        """
        names = tensor_names(self.layout, self.choice.format)
        rule = self.choice.scale_rule
        if rule is None:
            scale, input_scale = kernels.fp8_scale(weight_amax), kernels.fp8_scale(self.input_amax)
            large = {names.weight: kernels.quantize_fp8(weight, scale)}
        else:
            scale = kernels.nvfp4_global_scale(weight_amax, rule)
            input_scale = kernels.nvfp4_global_scale(self.input_amax)
            codes, block_scale = kernels.quantize_nvfp4(weight, scale, rule=rule)
            large = {names.weight: codes, names.weight_scale: block_scale}
        scalars = zip(names.scalars, (scale, input_scale), strict=True)
        small = {end: names.stored(scalar) for end, scalar in scalars}
        return {self.linear.name + end: tensor for end, tensor in (large | small).items()}


def read_weight(header: TensorHeader) -> Tensor:
    """A source weight in BF16, which is the precision that it is scored in."""
    return read_tensor(header).to(torch.bfloat16)


class WeightRanges:
    """Largest weight magnitudes of scale sets, read when a set is first asked for.

    Members of a set are neighbours in most checkpoints, so that what is read here for its range
    comes from the system's cache when it is read again to be quantized.

    Args:
        headers: where the weights are.
        linears: all that will be quantized; each belongs to a set.
    """

    def __init__(self, headers: Headers, linears: Iterable[Linear]) -> None:
        self._headers = headers
        self._unread: dict[str, list[Linear]] = {}
        self._known: dict[str, float] = {}
        for linear in linears:
            self._unread.setdefault(linear.weight_scale_set, []).append(linear)

    def __getitem__(self, scale_set: str) -> float:
        """The largest magnitude over the weights of a set.

        Raises:
            SourceError: a weight is NaN or infinite.
        """
        for linear in self._unread.pop(scale_set, ()):
            largest = _largest_magnitude(self._headers[linear.tensor])
            self._known[scale_set] = max(largest, self._known.get(scale_set, 0.0))
        return self._known[scale_set]


def _largest_magnitude(header: TensorHeader) -> float:
    lowest, highest = torch.aminmax(read_weight(header))
    largest = torch.maximum(-lowest, highest).item()
    if not largest < float("inf"):
        raise SourceError(
            f"{header.name} in {header.file.name} holds NaN or Inf.",
            fix="repair or download the model again; such a weight has no scale.",
        )
    return largest


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
