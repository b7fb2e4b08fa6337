"""Rounding with the error of each column carried into the columns after it: GPTQ's inner loop."""

from collections.abc import Sequence

import torch
from torch import Tensor

from autoquant_kernels import ops
from autoquant_kernels.checks import (
    BLOCK,
    require_blocks,
    require_dtype,
    require_rule,
    scale_values,
)


def compensate_nvfp4(
    w: Tensor, upper: Tensor, global_scale: float | Tensor, *, rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Round the columns of each row one after the other (Frantar et al., 2022).

    Column j of the weights that are left is coded under its block's scale; its error over U_jj goes
    times row j of U into all columns behind it. With U the upper Cholesky factor of the inverse of
    the inputs' second moments, that minimizes what the rounding does to the output.

    The scale of a block of 16 columns is chosen when its turn comes, from what is left of it. The
    rules `max`, `mse` and `four_over_six` are those of `quantize_nvfp4`, and so is `diagonal` with
    moments 1 / U_jj^2. `hessian` tries the E4M3 codes from 3 below to 8 above that of `max` and
    takes the one of least sum of squared errors over the diagonal, that of `max` itself on ties.

    Args:
        w: float32 `[N, C]`, C a multiple of 16, or `[E, N, C]` with one of `global_scale` and
            `upper` each.
        upper: float32 `[C, C]` or `[E, C, C]`, of positive diagonal; what is below the diagonal is
            not read.
        global_scale: positive float32, `nvfp4_global_scale(amax, rule)`, one or `[E]`; keep it on
            the host.
        rule: `max`, `mse`, `four_over_six`, `diagonal` or `hessian`.

    Returns:
        codes, uint8 `[..., N, C / 2]`, the even column in the low nibble; block scales,
        float8_e4m3fn `[..., N, C / 16]`; errors over the diagonal of `upper`, float32
        `[..., N, C]`. A NaN makes its block NaN, and so all blocks of the row behind it.

    Raises:
        ValueError: a shape, dtype, device, scale or rule that breaks these rules.
    """
    require_rule(rule)
    scales = _scales("global_scale", global_scale, w, upper)
    rows, columns = w.shape[:-1], w.shape[-1]
    codes = torch.empty(*rows, columns // 2, dtype=torch.uint8, device=w.device)
    block_scale = torch.empty(*rows, columns // BLOCK, dtype=torch.float8_e4m3fn, device=w.device)
    errors = torch.empty_like(w, memory_format=torch.contiguous_format)
    if w.numel():
        ops.compensate_nvfp4(
            w.contiguous().view(-1, columns),
            upper.contiguous().view(-1, columns, columns),
            scales,
            rule,
            codes.view(-1, columns // 2),
            block_scale.view(-1, columns // BLOCK),
            errors.view(-1, columns),
        )
    return codes, block_scale, errors


def compensate_fp8(w: Tensor, upper: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """The same to E4M3 codes, which have the scale of their matrix.

    Columns are rounded as `quantize_fp8` rounds: what is left beyond 448 scales saturates, and the
    columns behind it take over what that loses.

    Args:
        w: float32 `[N, C]`, C a multiple of 16, or `[E, N, C]` with one of `scale` and `upper`
            each.
        upper: float32 `[C, C]` or `[E, C, C]`, of positive diagonal.
        scale: positive float32, one or `[E]`; keep it on the host.

    Returns:
        codes, float8_e4m3fn `[..., N, C]`; errors over the diagonal of `upper`, float32
        `[..., N, C]`. A NaN makes all columns of the row behind it NaN.

    Raises:
        ValueError: a shape, dtype, device or scale that breaks these rules.
    """
    scales = _scales("scale", scale, w, upper)
    columns = w.shape[-1]
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    errors = torch.empty_like(w, memory_format=torch.contiguous_format)
    if w.numel():
        ops.compensate_fp8(
            w.contiguous().view(-1, columns),
            upper.contiguous().view(-1, columns, columns),
            scales,
            codes.view(-1, columns),
            errors.view(-1, columns),
        )
    return codes, errors


def _scales(name: str, scale: float | Tensor, w: Tensor, upper: Tensor) -> Sequence[float]:
    """The scale of each matrix of `w`, once all three fit each other."""
    require_dtype("w", w, torch.float32)
    require_dtype("upper", upper, torch.float32)
    require_blocks("w", w)
    scales = scale_values(name, scale, w.shape)
    if w.ndim not in (2, 3) or upper.shape != (*w.shape[:-2], w.shape[-1], w.shape[-1]):
        raise ValueError(
            f"w has shape {tuple(w.shape)} and upper {tuple(upper.shape)}; they must be [N, C] "
            "and [C, C], or one such for each of E matrices."
        )
    if upper.device != w.device:
        raise ValueError(f"w is on {w.device} and upper on {upper.device}; move them together.")
    if len(scales) != (len(w) if w.ndim == 3 else 1):
        raise ValueError(
            f"{name} has {len(scales)} values for w of {tuple(w.shape)}; it must have one for each "
            "matrix."
        )
    return scales
