"""Compensated rounding (GPTQ; Frantar et al., 2022): errors go into later columns.

With H = E[x x^T] of the inputs, an error D of the weight costs tr(D H D^T) in the product. Columns
are rounded in order, and what a column loses the columns after it make up for, by the Cholesky
factor of the inverse of H. A block of 16 columns is coded when its turn comes, from the weights
that are left then. Blocks of large inputs come first; what is stored keeps its order.

Shapes: M matrices with scales of their own, N outputs, K inputs, B blocks of 16 of them. Where K is
no multiple of 16, the last block is filled up with columns of zeros, which carry nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from autoquant.formats.base import Coder
from autoquant.formats.moments import BLOCK, identity_like
from autoquant.formats.rounded import Rounded

LAZY = 128
"""Columns that a kernel rounds together; their errors reach the rest in one product."""


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """In which order the blocks of M matrices are rounded, and how errors are carried."""

    order: Tensor
    """The block at each place, int64 [M, B]."""
    upper: Tensor
    """U with U^T U the inverse of the damped moments in that order, float32 [M, 16 B, 16 B]; the
    identity where there is none, so that nothing is carried."""
    has_factor: Tensor
    """Whether there is one, bool [M]."""

    @classmethod
    def of(cls, moments: Tensor, damping: Tensor) -> Self:
        """Of H, float32 [M, K, K], finite; dampings of its diagonal in shares of its mean, [M]."""
        filled = -moments.shape[-1] % BLOCK
        moments = pad(moments, (0, filled, 0, filled)) if filled else moments
        squares = moments.diagonal(dim1=1, dim2=2).view(len(moments), -1, BLOCK).sum(dim=2)
        order = squares.argsort(dim=1, descending=True, stable=True)
        upper, has_factor = _factor(_both_axes(moments, _columns(order)), damping)
        return cls(order, upper, has_factor)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One matrix after the other."""
        return cls(
            torch.cat([part.order for part in parts]),
            torch.cat([part.upper for part in parts]),
            torch.cat([part.has_factor for part in parts]),
        )


def compensated(weight: Tensor, coder: Coder, factor: Factor) -> Rounded:
    """Round every matrix.

    Args:
        weight: BF16 or float32 [M, N, K].
        coder: of the matrices.
        factor: of the moments of its inputs.
    """
    inputs, columns = weight.shape[2], _columns(factor.order)
    filled = columns.shape[1] - inputs
    whole = pad(weight, (0, filled)) if filled else weight
    rest = whole.float().gather(2, columns[:, None].expand(-1, weight.shape[1], -1))
    rounded = _sweep(rest, coder, factor.upper).in_order(factor.order.argsort(dim=1))
    return rounded.first(inputs, columns.shape[1]) if filled else rounded


def _columns(order: Tensor) -> Tensor:
    """The column at each place [M, K] of blocks in an order [M, B]."""
    return (order[:, :, None] * BLOCK + torch.arange(BLOCK, device=order.device)).flatten(1)


def _both_axes(moments: Tensor, columns: Tensor) -> Tensor:
    rows = moments.gather(1, columns[:, :, None].expand_as(moments))
    return rows.gather(2, columns[:, None].expand_as(moments))


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
    identity = identity_like(damped)
    has_factor = failed == 0
    lower = torch.where(has_factor[:, None, None], lower, identity)
    inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    return inverse.flip(1, 2).float(), has_factor


def _sweep(rest: Tensor, coder: Coder, upper: Tensor) -> Rounded:
    """Round the columns of float32 [M, N, K] from the first to the last; `rest` is overwritten."""
    codes = []
    inputs = rest.shape[2]
    for first in range(0, inputs, LAZY):
        last = min(first + LAZY, inputs)
        parts, errors = coder.compensate(rest[..., first:last], upper[:, first:last, first:last])
        codes.append(Rounded(parts))
        if last < inputs:
            rest[..., last:] -= errors @ upper[:, first:last, last:]
    return Rounded.of_columns(codes)
