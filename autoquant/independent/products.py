"""Every product of a model's own forward, seen from outside of its modules.

`torch.nn.functional.linear` is what linears and experts call, whatever module they are in; some
models (Falcon) multiply with a transposed weight instead. Weights are known by their first rows,
not by names or modules: a use that nobody knows of is seen too.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autoquant.independent.stored import BLOCK, InputQuantizer, StoredModel

_ROWS = 4
"""First rows of a weight that it is known by; linears joined along N begin with those of the first,
whose inputs they share."""

_MATRIX_PRODUCTS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm}
"""Of an input and a transposed weight; `@` is one of them."""

_LARGEST_E4M3, _LARGEST_E2M1 = 448.0, 6.0
_MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
"""Between neighbours of 0, 0.5, 1, 1.5, 2, 3, 4 and 6."""
_NUMBERS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


class Products(TorchFunctionMode):
    """While it is active, inputs of quantized weights are rounded, and the head is in float32.

    Args:
        stored: the checkpoint.
        model: transformers' model with its weights.
        rounds: whether inputs of so many bits are rounded where the model is served.
    """

    def __init__(self, stored: StoredModel, model: Any, rounds: Callable[[int], bool]) -> None:
        super().__init__()
        self._head: Tensor = model.get_output_embeddings().weight
        self._lasting = {own.untyped_storage().data_ptr() for own in model.parameters()}
        self._linears: dict[bytes, list[str]] = {}
        for name in stored.quantized:
            self._linears.setdefault(_key(stored.tensors[f"{name}.weight"]), []).append(name)
        self._inputs = {name: own for name, own in stored.inputs.items() if rounds(own.bits)}
        self._known: dict[tuple[int, torch.Size], list[str]] = {}
        self.used: set[str] = set()
        """Quantized linears of which a product has been seen."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.linear:
            return self._linear(*args, **(kwargs or {}))
        if func in _MATRIX_PRODUCTS and not kwargs:
            input, other = args
            if other.ndim == 2 and self._names(other.t()):
                return self._linear(input, other.t())
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        names = self._names(weight)
        self.used.update(names)
        if names and (own := self._inputs.get(names[0])) is not None:
            input = rounded(input, own)
        if weight is self._head:
            wide = None if bias is None else bias.float()
            return torch.nn.functional.linear(input.float(), weight.float(), wide)
        return torch.nn.functional.linear(input, weight, bias)

    def _names(self, weight: Tensor) -> list[str]:
        """The quantized linears that a weight in memory begins with."""
        if weight.untyped_storage().data_ptr() not in self._lasting:  # its place is used again
            return self._linears.get(_key(weight), [])
        place = (weight.data_ptr(), weight.shape)
        if place not in self._known:
            self._known[place] = self._linears.get(_key(weight), [])
        return self._known[place]


def _key(weight: Tensor) -> bytes:
    rows = weight.detach()[:_ROWS].to(torch.bfloat16).cpu().contiguous()
    return rows.view(torch.int16).numpy().tobytes()


def rounded(x: Tensor, own: InputQuantizer) -> Tensor:
    """`x` [*, K] as a quantized product reads it."""
    if own.bits == 8:
        rows = x.float().reshape(-1, own.block or x.shape[-1])
        scale = _own_scale(rows, own) if own.scale is None else own.scale
        codes = (rows / scale).clamp(-_LARGEST_E4M3, _LARGEST_E4M3)
        return (codes.to(torch.float8_e4m3fn).float() * scale).reshape(x.shape).to(x.dtype)
    assert own.scale is not None
    blocks = x.float().reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / (own.scale * _LARGEST_E2M1)
    scale = scale.clamp(max=_LARGEST_E4M3).to(torch.float8_e4m3fn).float() * own.scale
    ratio = torch.where(scale > 0, blocks.abs() / scale, 0).clamp(max=_LARGEST_E2M1)
    above = torch.bucketize(ratio, _MIDPOINTS.to(x.device), right=True)
    below = torch.bucketize(ratio, _MIDPOINTS.to(x.device))
    index = torch.where(above % 2 == 0, above, below)  # at a midpoint the even code
    numbers = _NUMBERS.to(x.device)[index] * scale
    return torch.copysign(numbers, blocks).reshape(x.shape).to(x.dtype)


def _own_scale(rows: Tensor, own: InputQuantizer) -> Tensor:
    """Of each row, [R, 1]: its largest value over E4M3's largest.

    For MXFP8 the powers of two of both (OCP Microscaling Formats 1.0, section 6.3).
    """
    largest = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if own.block is None:
        return largest / _LARGEST_E4M3
    return torch.exp2(largest.log2().floor() - math.floor(math.log2(_LARGEST_E4M3)))
