"""NVFP4 with the error of each column carried into the columns after it: the inner step of GPTQ."""

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
    require_dtype("w", w, torch.float32)
    require_dtype("upper", upper, torch.float32)
    require_dtype("block_scale", block_scale, torch.float8_e4m3fn)
    scales = scale_values("global_scale", global_scale, w.shape)
    expected = (*w.shape[:-2], BLOCK, BLOCK)
    if w.ndim not in (2, 3) or w.shape[-1] != BLOCK or upper.shape != expected:
        raise ValueError(
            f"w has shape {tuple(w.shape)} and upper {tuple(upper.shape)}; they must be [N, 16] "
            "and [16, 16], or one such for each of E matrices."
        )
    if block_scale.shape != w.shape[:-1]:
        raise ValueError(
            f"block_scale has shape {tuple(block_scale.shape)}; w needs {tuple(w.shape[:-1])}."
        )
    if len(scales) != (len(w) if w.ndim == 3 else 1):
        raise ValueError(f"there are {len(scales)} global scales for w of {tuple(w.shape)}.")
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
