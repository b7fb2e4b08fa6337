"""Weights that make up for what the quantized blocks before have changed, before they are rounded.

A weight W multiplies inputs z, where the BF16 model has x. With H = E[z z^T] and the drift
D = E[(x - z) z^T], the least-squares answer to W x is W + W D H^-1. As H and D are known from few
tokens, a part of that step is taken, with a ridge on H; tokens that were held out say which.

Shapes: M matrices, N outputs, K inputs.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from autoquant.formats.moments import (
    FITTED,
    HELD_OUT,
    Moments,
    identity_like,
    known_or_identity,
)

RATES = (0.25, 0.5, 0.75, 1.0)
"""Parts of the step that are tried besides none."""

RIDGES = (0.01, 0.1, 1.0)
"""Tried for the diagonal of H, in shares of its mean."""


@dataclass(frozen=True, eq=False)
class Refit:
    """How M weights are refitted."""

    weight: Tensor
    """float32 [M, N, K]."""
    moments: Moments
    """Of z."""
    drift: Moments
    rate: Tensor
    """Part of the step that each takes, float32 [M]."""
    ridge: Tensor
    """float32 [M]."""

    @classmethod
    def best(cls, weight: Tensor, moments: Moments, drift: Moments) -> Self:
        """The rate and the ridge of least error on inputs that were held out.

        Args:
            weight: BF16 [M, N, K].
            moments: of z, on the device of `weight`.
            drift: from x; what is not finite counts as none.
        """
        nothing = weight.new_zeros(len(weight), dtype=torch.float32)
        found = cls(weight.float(), moments, drift, nothing, nothing)
        held_out = known_or_identity(moments.mean(HELD_OUT))
        pull = found.pull(HELD_OUT)
        least, rate, ridge = nothing, nothing, nothing
        for own in RIDGES:
            step = found._step(FITTED, nothing + own)
            square = (step @ held_out * step).sum(dim=(1, 2))
            along = (pull * step).sum(dim=(1, 2))
            for part in RATES:
                error = part**2 * square - 2 * part * along
                better = error < least
                least = torch.where(better, error, least)
                rate, ridge = (
                    torch.where(better, new, old) for new, old in ((part, rate), (own, ridge))
                )
        return cls(found.weight, moments, drift, rate, ridge)

    def pull(self, tokens: slice) -> Tensor:
        """W D, float32 [M, N, K]."""
        drift = self.drift.mean(tokens)
        known = drift.isfinite().flatten(1).all(dim=1)
        return self.weight @ torch.where(known[:, None, None], drift, 0.0)

    def refitted(self, tokens: slice) -> Tensor:
        """The weights that codes are to be near, float32 [M, N, K]."""
        return self.weight + self.rate[:, None, None] * self._step(tokens, self.ridge)

    def _step(self, tokens: slice, ridge: Tensor) -> Tensor:
        """W D (H + ridge)^-1; nothing where that has no Cholesky factor."""
        damped = known_or_identity(self.moments.mean(tokens)).double()
        diagonal = damped.diagonal(dim1=1, dim2=2)
        diagonal += (ridge.double() * diagonal.mean(dim=1))[:, None]
        lower, failed = torch.linalg.cholesky_ex(damped)
        has_factor = (failed == 0)[:, None, None]
        lower = torch.where(has_factor, lower, identity_like(lower))
        step = torch.cholesky_solve(self.pull(tokens).double().mT, lower).mT.float()
        return torch.where(has_factor, step, 0.0)
