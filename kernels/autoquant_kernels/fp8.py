"""FP8 E4M3 with one float32 scale per matrix, divided in float32 and rounded once."""

import torch
from torch import Tensor

from autoquant_kernels import ops
from autoquant_kernels.checks import (
    output,
    require_dtype,
    require_float,
    require_output_dtype,
    scale_values,
)


def fake_quant_fp8(x: Tensor, scale: float | Tensor, *, out: Tensor | None = None) -> Tensor:
    """Round through E4M3: y = RN(e4m3(clamp(RN(x / scale), +-448)) scale), then to `x`'s dtype.

    Args:
        x: bfloat16, float16 or float32, any shape.
        scale: positive float32, `fp8_scale(amax)`, one or `[E]` for `x` `[E, ...]` of two or more
            dimensions; keep it on the host.
        out: where to write, contiguous, of the shape and dtype of `x`.

    Returns:
        `x`'s shape, dtype and device. NaN stays NaN, Inf saturates, zeros keep their sign.

    Raises:
        ValueError: a dtype, device, scale or `out` that breaks these rules, before any writing.
    """
    require_float("x", x)
    scales = scale_values("scale", scale, x.shape)
    out = output(out, tuple(x.shape), x.dtype, x)
    if x.numel():
        ops.fake_quant_fp8(x.detach().contiguous(), scales, out)
    return out


def quantize_fp8(x: Tensor, scale: float | Tensor) -> Tensor:
    """The E4M3 codes that a checkpoint stores: e4m3(clamp(RN(x / scale), +-448)).

    Args:
        x: bfloat16, float16 or float32, any shape.
        scale: positive float32, `fp8_scale(amax)`, one or `[E]` for `x` `[E, ...]` of two or more
            dimensions; keep it on the host.

    Returns:
        float8_e4m3fn of `x`'s shape. A NaN becomes code 0x7F.

    Raises:
        ValueError: a dtype or scale that breaks these rules.
    """
    require_float("x", x)
    scales = scale_values("scale", scale, x.shape)
    codes = output(None, tuple(x.shape), torch.float8_e4m3fn, x)
    if x.numel():
        ops.quantize_fp8(x.detach().contiguous(), scales, codes)
    return codes


def dequantize_fp8(
    codes: Tensor,
    scale: float | Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """The numbers that E4M3 codes stand for: RN(code x scale), then to `dtype`.

    Args:
        codes: float8_e4m3fn, any shape.
        scale: positive float32, the `weight_scale` of the checkpoint, one or `[E]`.
        dtype: bfloat16, float16 or float32.
        out: where to write, contiguous, of the shape of `codes` and of `dtype`.

    Raises:
        ValueError: a dtype, device, scale or `out` that breaks these rules.
    """
    require_dtype("codes", codes, torch.float8_e4m3fn)
    require_output_dtype(dtype)
    scales = scale_values("scale", scale, codes.shape)
    out = output(out, tuple(codes.shape), dtype, codes)
    if codes.numel():
        ops.dequantize_fp8(codes.contiguous(), scales, out)
    return out
