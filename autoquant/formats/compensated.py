"""Compensated rounding of NVFP4 (GPTQ; Frantar et al., 2022): errors go into later columns.

With H = E[x x^T] of the inputs, an error D of the weight costs tr(D H D^T) in the product. Columns
are rounded in order, and what a column loses the columns after it make up for, by the Cholesky
factor of the inverse of H. A block of 16 columns gets its scales when its turn comes, from the
weights that are left then. Blocks of large inputs come first; what is stored keeps its order.

Shapes: M matrices with scales of their own, N outputs, K inputs, B blocks of 16 of them.
"""

import autoquant_kernels as kernels
import torch
from torch import Tensor

from autoquant.formats.moments import BLOCK
from autoquant.formats.rounded import Rounded

LAZY = 128
"""Columns whose errors reach the rest of the matrix in one product."""


def compensated(
    weight: Tensor, scale: Tensor, rule: str, moments: Tensor, damping: Tensor
) -> tuple[Rounded, Tensor]:
    """Round every matrix by its moments.

    Args:
        weight: BF16 [M, N, K].
        scale: global scales, float32 [M] on the host.
        rule: how block scales are chosen; `hessian` takes those of least compensated error.
        moments: H, float32 [M, K, K], finite.
        damping: of the diagonal of each H, in shares of its mean, float32 [M].

    Returns:
        The codes, and whether each H has a Cholesky factor, bool [M]; without one nothing is
        carried.
    """
    matrices, outputs, inputs = weight.shape
    squares = moments.diagonal(dim1=1, dim2=2).view(matrices, -1, BLOCK).sum(dim=2)
    order = squares.argsort(dim=1, descending=True, stable=True)
    columns = (order[:, :, None] * BLOCK + torch.arange(BLOCK, device=order.device)).flatten(1)
    upper, has_factor = _factor(_both_axes(moments, columns), damping)
    rest = weight.float().gather(2, columns[:, None].expand(-1, outputs, -1))
    rounded = _sweep(rest, scale, rule, upper)
    return _in_order(rounded, order.argsort(dim=1), inputs), has_factor


def _both_axes(moments: Tensor, columns: Tensor) -> Tensor:
    rows = moments.gather(1, columns[:, :, None].expand_as(moments))
    return rows.gather(2, columns[:, None].expand_as(moments))


def _in_order(rounded: Rounded, place: Tensor, inputs: int) -> Rounded:
    """Blocks back where they are stored; `place` [M, B] says where each is."""
    matrices, outputs, _ = rounded.codes.shape
    codes = rounded.codes.view(matrices, outputs, -1, BLOCK // 2)
    at = place[:, None].expand(-1, outputs, -1)
    stored = rounded.block_scale.view(torch.uint8).gather(2, at).view(torch.float8_e4m3fn)
    codes = codes.gather(2, at[..., None].expand(-1, -1, -1, BLOCK // 2))
    return Rounded(codes.reshape(matrices, outputs, inputs // 2), stored)


def _factor(moments: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Upper U [M, K, K] with U^T U the inverse of the damped moments, and whether there is one.

    The identity where there is none.

    With both axes turned around, U is the inverse of the lower Cholesky factor: of float64, so that
    the condition of the moments costs no digit that float32 has.
    """
    damped = moments.double()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += (damping.double() * diagonal.mean(dim=1))[:, None]
    lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
    identity = torch.eye(damped.shape[-1]).to(damped)
    has_factor = failed == 0
    lower = torch.where(has_factor[:, None, None], lower, identity)
    inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    return inverse.flip(1, 2).float(), has_factor


def _sweep(rest: Tensor, scale: Tensor, rule: str, upper: Tensor) -> Rounded:
    """Round float32 [M, N, K] block by block; `rest` is overwritten."""
    codes, scales = [], []
    inputs = rest.shape[-1]
    for first in range(0, inputs, LAZY):
        last = min(first + LAZY, inputs)
        errors = []
        for start in range(first, last, BLOCK):
            own = slice(start, start + BLOCK)
            packed, stored, error = kernels.compensate_nvfp4(
                rest[..., own],
                upper[:, own, own],
                scale,
                _first_scale(rest[..., own], scale, rule, upper[:, own, own]),
                search=rule == "hessian",
            )
            rest[..., own.stop : last] -= error @ upper[:, own, own.stop : last]
            codes.append(packed)
            scales.append(stored.view(torch.uint8))
            errors.append(error)
        rest[..., last:] -= torch.cat(errors, dim=2) @ upper[:, first:last, last:]
    stacked = torch.stack(scales, dim=2).view(torch.float8_e4m3fn)
    return Rounded(torch.cat(codes, dim=2), stacked)


def _first_scale(block: Tensor, scale: Tensor, rule: str, upper: Tensor) -> Tensor:
    """Scales [M, N] of a block of columns by its rule; where `hessian` begins its search."""
    weighs = None
    if rule == "diagonal":
        weighs = upper.diagonal(dim1=1, dim2=2).square().reciprocal()[:, None]
    of_rule = "max" if rule == "hessian" else rule
    _, stored = kernels.quantize_nvfp4(block, scale, rule=of_rule, moments=weighs)
    return stored[..., 0]
