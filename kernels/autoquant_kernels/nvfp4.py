"""NVFP4: 16 consecutive elements of a row share an E4M3 scale, and the tensor a float32 scale."""

import torch
from torch import Tensor

from autoquant_kernels import ops
from autoquant_kernels.checks import (
    BLOCK,
    moment_values,
    output,
    require_blocks,
    require_dtype,
    require_float,
    require_output_dtype,
    require_rule,
    scale_values,
)


def fake_quant_nvfp4(
    x: Tensor, global_scale: float | Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Round activations through NVFP4 as hardware does: block scales are taken from `x` itself.

    Per block of 16, with RN the rounding to nearest even in float32 and g the global scale:
    e = e4m3(min(RN(max|x| / RN(6 g)), 448)), s = RN(e g), y = RN(e2m1(RN(x / s)) s). Every element
    keeps its sign, zeros too; a block whose scale underflows becomes zeros; Inf saturates.

    Args:
        x: bfloat16, float16 or float32 `[..., K]`, K a multiple of 16.
        global_scale: positive float32, the calibrated `nvfp4_global_scale`, one or `[E]` for
            `x` `[E, ..., K]`; keep it on the host.
        out: where to write, contiguous, of the shape and dtype of `x`.

    Returns:
        `x`'s shape, dtype and device. A NaN makes its block of 16 NaN.

    Raises:
        ValueError: a shape, dtype, device, scale or `out` that breaks these rules; nothing is
            written then.
    """
    require_float("x", x)
    require_blocks("x", x)
    scales = scale_values("global_scale", global_scale, x.shape)
    out = output(out, tuple(x.shape), x.dtype, x)
    if x.numel():
        ops.fake_quant_nvfp4(x.detach().contiguous(), scales, out)
    return out


def fake_quant_nvfp4_weight(
    w: Tensor,
    global_scale: float | Tensor,
    *,
    rule: str = "max",
    moments: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Round a weight through NVFP4 as it is exported: `dequantize_nvfp4(*quantize_nvfp4(w))`.

    Bit for bit the same, signed zeros included, without storing the codes.

    Args:
        w: bfloat16, float16 or float32 `[..., K]`, K a multiple of 16.
        global_scale: positive float32, `nvfp4_global_scale(amax, rule)`, one or `[E]` for `w`
            `[E, ..., K]`; keep it on the host.
        rule: how block scales are chosen, see `quantize_nvfp4`.
        moments: see `quantize_nvfp4`.
        out: where to write, contiguous, of the shape and dtype of `w`.

    Returns:
        `w`'s shape, dtype and device. A NaN makes its block of 16 NaN.

    Raises:
        ValueError: as `fake_quant_nvfp4`, or an unknown `rule`.
    """
    require_float("w", w)
    require_blocks("w", w)
    require_rule(rule)
    scales = scale_values("global_scale", global_scale, w.shape)
    weights = moment_values(rule, moments, w.shape, len(scales), w.device)
    out = output(out, tuple(w.shape), w.dtype, w)
    if w.numel():
        ops.fake_quant_nvfp4_weight(w.detach().contiguous(), scales, rule, weights, out)
    return out


def quantize_nvfp4(
    w: Tensor,
    global_scale: float | Tensor,
    *,
    rule: str = "max",
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize a weight to the codes and block scales that a checkpoint stores.

    Per block of 16, with p = RN(max|w| / RN(6 g)): the block scale is
    e = e4m3(clamp(p, 2^-9, 448)), 1 for a block of zeros; a code is e2m1(RN(w / RN(e g))) with
    bit 3 set where w < 0, so -0.0 is code 0 and a negative number that rounds to zero is code 8.

    Rules: `max` takes e as above. `mse` takes, among the E4M3 codes from 3 below to 8 above it, the
    one of least squared error, the smallest on ties. `four_over_six` (g from M = 256) also tries
    the scale that maps max|w| to 4 and takes it if its squared error is strictly less
    (arXiv 2512.02010). `diagonal` and `hessian` are `mse` with the error d of a block weighted by
    second moments M of its inputs: sum of M_ii d_i^2, or of d_i M_ij d_j.

    Args:
        w: bfloat16, float16 or float32 `[..., K]`, K a multiple of 16.
        global_scale: positive float32, `nvfp4_global_scale(amax, rule)`, one or `[E]` for `w`
            `[E, ..., K]`; keep it on the host.
        rule: `max`, `mse`, `four_over_six`, `diagonal` or `hessian`.
        moments: of the inputs, float32 on the device of `w`: `[K / 16, 16]` for `diagonal`,
            `[K / 16, 16, 16]` for `hessian`, or one such for each scale.

    Returns:
        codes, uint8 `[..., K / 2]`, the even column in the low nibble; block scales, float8_e4m3fn
        `[..., K / 16]`. A block with a NaN has a NaN scale and zero codes.

    Raises:
        ValueError: a shape, dtype, scale, rule or moments that break these rules.
    """
    require_float("w", w)
    require_blocks("w", w)
    require_rule(rule)
    scales = scale_values("global_scale", global_scale, w.shape)
    weights = moment_values(rule, moments, w.shape, len(scales), w.device)
    rows = tuple(w.shape[:-1])
    codes = output(None, (*rows, w.shape[-1] // 2), torch.uint8, w)
    block_scale = output(None, (*rows, w.shape[-1] // BLOCK), torch.float8_e4m3fn, w)
    if w.numel():
        ops.quantize_nvfp4(w.detach().contiguous(), scales, rule, weights, codes, block_scale)
    return codes, block_scale


def dequantize_nvfp4(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: float | Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """The numbers that packed NVFP4 codes stand for: RN(e2m1 value x RN(block scale x g)).

    Args:
        codes: uint8 `[..., K / 2]`, the even column in the low nibble.
        block_scale: float8_e4m3fn `[..., K / 16]`.
        global_scale: positive float32, the `weight_scale_2` of the checkpoint, one or `[E]` for
            codes `[E, ..., K / 2]`.
        dtype: bfloat16, float16 or float32.
        out: where to write, contiguous `[..., K]` of `dtype`.

    Returns:
        `[..., K]` of `dtype`.

    Raises:
        ValueError: a shape, dtype, device, scale or `out` that breaks these rules.
    """
    require_dtype("codes", codes, torch.uint8)
    require_dtype("block_scale", block_scale, torch.float8_e4m3fn)
    require_output_dtype(dtype)
    require_matching_blocks(codes, block_scale)
    shape = (*codes.shape[:-1], codes.shape[-1] * 2)
    scales = scale_values("global_scale", global_scale, shape)
    out = output(out, shape, dtype, codes, block_scale)
    if codes.numel():
        ops.dequantize_nvfp4(codes.contiguous(), block_scale.contiguous(), scales, out)
    return out


def require_matching_blocks(codes: Tensor, block_scale: Tensor) -> None:
    """Raise unless every 8 bytes of `codes` have one entry in `block_scale`."""
    half = BLOCK // 2
    if codes.ndim == 0 or codes.shape[-1] % half:
        raise ValueError(
            f"codes have shape {tuple(codes.shape)}; their last dimension must be a multiple of "
            f"{half}: 16 elements of 4 bits share a scale."
        )
    expected = (*codes.shape[:-1], codes.shape[-1] // half)
    if tuple(block_scale.shape) != expected:
        raise ValueError(
            f"block_scale has shape {tuple(block_scale.shape)}; codes of shape "
            f"{tuple(codes.shape)} need {expected}."
        )
