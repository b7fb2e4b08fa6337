"""Rounding with the error of each column carried into the columns after it: GPTQ's inner step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from autoquant_kernels import ops
from autoquant_kernels.checks import BLOCK, require_dtype, scale_values


def compensate_nvfp4(
    w: Tensor, upper: Tensor, global_scale: float | Tensor, block_scale: Tensor, *, search: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Round one block of 16 columns of each row, a column at a time (Frantar et al., 2022).

    Column j of the weights that are left is coded under the block's scale; its error over U_jj goes
    times row j of U into the columns behind it. With U the upper Cholesky factor of the inverse of
    the inputs' second moments, that minimizes what the rounding does to the output.

    Args:
        w: float32 `[N, 16]`, or `[E, N, 16]` with one of `global_scale` and `upper` each.
        upper: float32 `[16, 16]` or `[E, 16, 16]`, of positive diagonal.
        global_scale: positive float32, one or `[E]`; keep it on the host.
        block_scale: float8_e4m3fn `[N]` or `[E, N]`.
        search: whether the E4M3 codes from 3 below to 8 above `block_scale` are tried too, and the
            one of least sum of squared errors is taken, `block_scale` itself on ties.

    Returns:
        codes, uint8 `[..., N, 8]`, the even column in the low nibble; block scales, float8_e4m3fn
        `[..., N]`; errors over the diagonal of `upper`, float32 `[..., N, 16]`.

    Raises:
        ValueError: a shape, dtype or scale that breaks these rules.
    """
    require_dtype("block_scale", block_scale, torch.float8_e4m3fn)
    scales = _scales("global_scale", global_scale, w, upper)
    if block_scale.shape != w.shape[:-1]:
        raise ValueError(
            f"block_scale has shape {tuple(block_scale.shape)}; w needs {tuple(w.shape[:-1])}."
        )
    codes = torch.empty(*w.shape[:-1], BLOCK // 2, dtype=torch.uint8, device=w.device)
    found, errors = block_scale.clone(), torch.empty_like(w, memory_format=torch.contiguous_format)
    if w.numel():
        ops.compensate_nvfp4(
            w.contiguous().view(-1, BLOCK),
            upper.contiguous().view(-1, BLOCK, BLOCK),
            scales,
            search,
            codes.view(-1, BLOCK // 2),
            found.view(-1, 1),
            errors.view(-1, BLOCK),
        )
    return codes, found, errors


def compensate_fp8(w: Tensor, upper: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """The same to E4M3 codes, which have the scale of their matrix.

    Columns are rounded as `quantize_fp8` rounds: what is left beyond 448 scales saturates, and the
    columns behind it take over what that loses.

    Args:
        w: float32 `[N, 16]`, or `[E, N, 16]` with one of `scale` and `upper` each.
        upper: float32 `[16, 16]` or `[E, 16, 16]`, of positive diagonal.
        scale: positive float32, one or `[E]`; keep it on the host.

    Returns:
        codes, float8_e4m3fn `[..., N, 16]`; errors over the diagonal of `upper`, float32
        `[..., N, 16]`.

    Raises:
        ValueError: a shape, dtype or scale that breaks these rules.
    """
    scales = _scales("scale", scale, w, upper)
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    errors = torch.empty_like(w, memory_format=torch.contiguous_format)
    if w.numel():
        ops.compensate_fp8(
            w.contiguous().view(-1, BLOCK),
            upper.contiguous().view(-1, BLOCK, BLOCK),
            scales,
            codes.view(-1, BLOCK),
            errors.view(-1, BLOCK),
        )
    return codes, errors


def _scales(name: str, scale: float | Tensor, w: Tensor, upper: Tensor) -> Sequence[float]:
    """The scale of each matrix of `w`, once all three fit each other."""
    require_dtype("w", w, torch.float32)
    require_dtype("upper", upper, torch.float32)
    scales = scale_values(name, scale, w.shape)
    expected = (*w.shape[:-2], BLOCK, BLOCK)
    if w.ndim not in (2, 3) or w.shape[-1] != BLOCK or upper.shape != expected:
        raise ValueError(
            f"w has shape {tuple(w.shape)} and upper {tuple(upper.shape)}; they must be [N, 16] "
            "and [16, 16], or one such for each of E matrices."
        )
    if len(scales) != (len(w) if w.ndim == 3 else 1):
        raise ValueError(
            f"{name} has {len(scales)} values for w of {tuple(w.shape)}; it must have one for each "
            "matrix."
        )
    return scales
