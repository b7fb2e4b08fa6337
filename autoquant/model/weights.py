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
    """Keeps fake-quantized weights up to a limit; beyond it they go through one scratch buffer.

    A weight that did not fit is computed anew unless it was the last, which costs a few per cent
    of its matrix product at the token counts of a search.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._kept: dict[tuple[str, Choice], torch.Tensor] = {}
        self._kept_bytes = 0
        self._scratch: torch.Tensor | None = None
        self._scratch_key: tuple[str, Choice] | None = None

    def get(
        self,
        key: tuple[str, Choice],
        like: torch.Tensor,
        compute: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The tensor of `key`, shaped like `like`; `compute(out)` writes it where it is absent."""
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        size = like.numel() * like.element_size()
        if self._kept_bytes + size > self.limit_bytes:
            return self._through_scratch(key, like, compute)
        self._kept[key] = compute(torch.empty_like(like))
        self._kept_bytes += size
        return self._kept[key]

    def put(self, key: tuple[str, Choice], weight: torch.Tensor, like: torch.Tensor) -> None:
        """Keep a given weight, whatever the limit, on the device and in the dtype of `like`."""
        self._kept[key] = weight.to(like)

    def _through_scratch(
        self,
        key: tuple[str, Choice],
        like: torch.Tensor,
        compute: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        if self._scratch is None or self._scratch.numel() < like.numel():
            self._scratch, self._scratch_key = None, None
            self._scratch = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        weight = self._scratch[: like.numel()].view(like.shape)
        if key != self._scratch_key:
            self._scratch_key = None
            compute(weight)
            self._scratch_key = key
        return weight
