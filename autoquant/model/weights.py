"""Fake-quantized weights, computed as they will be exported and kept while memory allows."""

from collections.abc import Callable

import autoquant_kernels as kernels
import torch

from autoquant.formats import Choice, Format


def fake_quantize(
    weight: torch.Tensor,
    amax: float | torch.Tensor,
    choice: Choice,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight [N, K] that engines multiply with after exporting it in `choice`.

    Args:
        weight: BF16; [E, N, K] for experts, each with scales of its own.
        amax: largest magnitude over the weight's scale set; [E] for experts, on the CPU.
        out: where to write; allocated if absent.
    """
    if choice.format is Format.FP8:
        return kernels.fake_quant_fp8(weight, kernels.fp8_scale(amax), out=out)
    assert choice.scale_rule is not None
    scale = kernels.nvfp4_global_scale(amax, choice.scale_rule)
    return kernels.fake_quant_nvfp4_weight(weight, scale, rule=choice.scale_rule, out=out)


def largest_magnitude(weight: torch.Tensor) -> float:
    """max |w| of a finite tensor, exact."""
    return _largest(weight).item()


def largest_of_experts(weight: torch.Tensor) -> torch.Tensor:
    """max |w| of every expert of a finite [E, N, K], exact: float32 [E] on the CPU."""
    return torch.stack([_largest(expert) for expert in weight]).float().cpu()


def _largest(weight: torch.Tensor) -> torch.Tensor:
    lowest, highest = torch.aminmax(weight)
    return torch.maximum(-lowest, highest)


class WeightStore:
    """Keeps fake-quantized weights up to a limit, and beyond it those that were used last.

    A weight that is not there is computed anew, which costs a few per cent of its matrix product at
    the token counts of a search.

    Args:
        limit_bytes: for weights that stay.
        recent_bytes: for the last ones used; the very last is always there.
    """

    def __init__(self, limit_bytes: int, recent_bytes: int = 0) -> None:
        self.limit_bytes = limit_bytes
        self.recent_bytes = recent_bytes
        self._kept: dict[tuple[str, Choice], torch.Tensor] = {}
        self._kept_bytes = 0
        self._recent: dict[tuple[str, Choice], torch.Tensor] = {}

    def get(
        self,
        key: tuple[str, Choice],
        like: torch.Tensor,
        compute: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The tensor of `key`, shaped like `like`; `compute(out)` writes it where it is absent."""
        found = self._kept.get(key)
        if found is None:
            found = self._recent.get(key)
        if found is not None:
            return found
        size = _bytes(like)
        if self._kept_bytes + size <= self.limit_bytes:
            self._kept[key] = compute(torch.empty_like(like))
            self._kept_bytes += size
            return self._kept[key]
        while self._recent and sum(map(_bytes, self._recent.values())) + size > self.recent_bytes:
            del self._recent[next(iter(self._recent))]
        self._recent[key] = compute(torch.empty_like(like))
        return self._recent[key]

    def put(self, key: tuple[str, Choice], weight: torch.Tensor, like: torch.Tensor) -> None:
        """Keep a given weight, whatever the limit, on the device and in the dtype of `like`."""
        self._kept[key] = weight.to(like)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
