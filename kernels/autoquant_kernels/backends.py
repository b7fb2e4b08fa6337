"""Which implementation serves a device; `AUTOQUANT_KERNELS` forces one."""

from typing import Protocol, cast

import torch
from torch import Tensor

from autoquant_kernels import reference

VARIABLE = "AUTOQUANT_KERNELS"


class Backend(Protocol):
    """The operations on contiguous tensors of one device, with scales already checked."""

    def fake_quant_nvfp4(self, x: Tensor, global_scale: float, out: Tensor) -> None:
        """Dynamic NVFP4, `[..., K]` to `[..., K]`."""

    def fake_quant_nvfp4_weight(
        self, x: Tensor, global_scale: float, rule: str, out: Tensor
    ) -> None:
        """Exported-form NVFP4, `[..., K]` to `[..., K]`."""

    def quantize_nvfp4(
        self, x: Tensor, global_scale: float, rule: str, codes: Tensor, block_scale: Tensor
    ) -> None:
        """NVFP4 codes and block scales of `[..., K]`."""

    def dequantize_nvfp4(
        self, codes: Tensor, block_scale: Tensor, global_scale: float, out: Tensor
    ) -> None:
        """NVFP4 codes and block scales to `[..., K]`."""

    def fake_quant_fp8(self, x: Tensor, scale: float, out: Tensor) -> None:
        """FP8 there and back, any shape."""

    def quantize_fp8(self, x: Tensor, scale: float, codes: Tensor) -> None:
        """FP8 codes of any shape."""

    def dequantize_fp8(self, codes: Tensor, scale: float, out: Tensor) -> None:
        """FP8 codes to numbers."""

    def token_kl(self, reference: Tensor, logits: Tensor, out: Tensor) -> None:
        """KL in nats of two `[T, V]` tiles to float32 `[T]`."""


def backend_for(device: torch.device) -> Backend:
    """The implementation that serves `device` under the current `AUTOQUANT_KERNELS`."""
    del device
    return cast("Backend", reference)


def active_backend(device: torch.device | str = "cpu") -> str:
    """The name of the implementation that serves `device`."""
    del device
    return "reference"
