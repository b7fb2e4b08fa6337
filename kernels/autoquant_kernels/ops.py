"""The operations as PyTorch sees them: opaque to compilers, writing into tensors they are given.

`scales` holds one scale for the whole tensor, or one for each matrix along its first dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from autoquant_kernels.backends import backend_for


@torch.library.custom_op("autoquant::fake_quant_nvfp4", mutates_args=("out",))
def fake_quant_nvfp4(x: Tensor, scales: Sequence[float], out: Tensor) -> None:
    """Dynamic NVFP4, `[..., K]` to `[..., K]`."""
    backend_for(x.device).fake_quant_nvfp4(x, scales, out)


@torch.library.custom_op("autoquant::fake_quant_nvfp4_weight", mutates_args=("out",))
def fake_quant_nvfp4_weight(
    x: Tensor, scales: Sequence[float], rule: str, moments: Tensor | None, out: Tensor
) -> None:
    """Exported-form NVFP4, `[..., K]` to `[..., K]`."""
    backend_for(x.device).fake_quant_nvfp4_weight(x, scales, rule, moments, out)


@torch.library.custom_op("autoquant::quantize_nvfp4", mutates_args=("codes", "block_scale"))
def quantize_nvfp4(
    x: Tensor,
    scales: Sequence[float],
    rule: str,
    moments: Tensor | None,
    codes: Tensor,
    block_scale: Tensor,
) -> None:
    """NVFP4 codes and block scales of `[..., K]`."""
    backend_for(x.device).quantize_nvfp4(x, scales, rule, moments, codes, block_scale)


@torch.library.custom_op(
    "autoquant::compensate_nvfp4", mutates_args=("codes", "block_scale", "errors")
)
def compensate_nvfp4(
    w: Tensor,
    upper: Tensor,
    scales: Sequence[float],
    rule: str,
    codes: Tensor,
    block_scale: Tensor,
    errors: Tensor,
) -> None:
    """NVFP4 codes, block scales and errors of `[P * N, C]`, carried by `[P, C, C]`."""
    backend_for(w.device).compensate_nvfp4(w, upper, scales, rule, codes, block_scale, errors)


@torch.library.custom_op("autoquant::dequantize_nvfp4", mutates_args=("out",))
def dequantize_nvfp4(
    codes: Tensor, block_scale: Tensor, scales: Sequence[float], out: Tensor
) -> None:
    """NVFP4 codes and block scales to `[..., K]`."""
    backend_for(codes.device).dequantize_nvfp4(codes, block_scale, scales, out)


@torch.library.custom_op("autoquant::fake_quant_fp8", mutates_args=("out",))
def fake_quant_fp8(x: Tensor, scales: Sequence[float], out: Tensor) -> None:
    """FP8 there and back, any shape."""
    backend_for(x.device).fake_quant_fp8(x, scales, out)


@torch.library.custom_op("autoquant::quantize_fp8", mutates_args=("codes",))
def quantize_fp8(x: Tensor, scales: Sequence[float], codes: Tensor) -> None:
    """FP8 codes of any shape."""
    backend_for(x.device).quantize_fp8(x, scales, codes)


@torch.library.custom_op("autoquant::compensate_fp8", mutates_args=("codes", "errors"))
def compensate_fp8(
    w: Tensor, upper: Tensor, scales: Sequence[float], codes: Tensor, errors: Tensor
) -> None:
    """FP8 codes and errors of `[P * N, C]`, carried by `[P, C, C]`."""
    backend_for(w.device).compensate_fp8(w, upper, scales, codes, errors)


@torch.library.custom_op("autoquant::dequantize_fp8", mutates_args=("out",))
def dequantize_fp8(codes: Tensor, scales: Sequence[float], out: Tensor) -> None:
    """FP8 codes to numbers."""
    backend_for(codes.device).dequantize_fp8(codes, scales, out)


@torch.library.custom_op("autoquant::token_kl", mutates_args=("out",))
def token_kl(reference: Tensor, logits: Tensor, out: Tensor) -> None:
    """KL in nats of two `[T, V]` tiles to float32 `[T]`."""
    backend_for(logits.device).token_kl(reference, logits, out)


def _traced(*args: object) -> None:
    """Nothing to do while a graph is traced: outputs are arguments."""


for _op in (
    fake_quant_nvfp4,
    fake_quant_nvfp4_weight,
    quantize_nvfp4,
    compensate_nvfp4,
    dequantize_nvfp4,
    fake_quant_fp8,
    quantize_fp8,
    compensate_fp8,
    dequantize_fp8,
    token_kl,
):
    _op.register_fake(_traced)
