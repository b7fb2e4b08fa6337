"""Second moments of inputs: by them rounding knows what an error does to a product.

Shapes: M matrices (one weight, or an expert each), K inputs.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BLOCK = 16
FEWEST_TOKENS = 64
"""A matrix whose inputs were seen fewer times has the codes of the weight alone."""

FITTED, HELD_OUT, ALL = slice(0, 1), slice(1, 2), slice(0, 2)
"""Tokens that codes are fitted to, tokens that say whether it was any good, and both."""

RIDGE = 0.01
"""What is added to the diagonal of a block's moments, in shares of the matrix's mean: a channel
that is silent on the calibration text may speak later."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Sums of x x^T over the inputs of M matrices."""

    sums: Tensor
    """float32 [2, M, K, K]: of tokens to fit, and of tokens held out. [2, 0, K, K] of experts whose
    layer's alone are kept."""
    tokens: Tensor
    """int64 [2, M]."""
    layer_sums: Tensor | None = None
    """Of experts: sums over all of their layer, float32 [2, K, K]."""
    layer_tokens: Tensor | None = None
    """int64 [2]."""
    kept: dict[Hashable, Any] = field(init=False, default_factory=dict, repr=False)
    """What was worked out of them and is asked for again."""

    def mean(self, tokens: slice = ALL) -> Tensor:
        """E[x x^T], float32 [M, K, K]; zeros without a token, NaN or Inf where sums are not finite.

        An expert's is drawn toward its layer's, with the weight n / (n + K) of its own n tokens:
        fewer tokens than channels say nothing of some directions.
        """
        seen = self.tokens[tokens].sum(dim=0)
        if self.layer_sums is None or self.layer_tokens is None:
            return _mean(self.sums[tokens].sum(dim=0), seen)
        layer = _mean(self.layer_sums[tokens].sum(dim=0), self.layer_tokens[tokens].sum(dim=0))
        if not self.sums.shape[1]:
            return layer.expand(len(seen), -1, -1)
        own = _mean(self.sums[tokens].sum(dim=0), seen)
        weight = (seen / (seen + own.shape[-1])).to(own)[:, None, None]
        return own * weight + layer * (1 - weight)

    def of_blocks(self, rule: str, tokens: slice = ALL) -> Tensor:
        """What `quantize_nvfp4` weighs by: moments of each block of columns over the matrix's mean.

        Ones on the diagonal where inputs are unknown or were all zero.

        Args:
            rule: `hessian` for float32 [M, K / 16, 16, 16], `diagonal` for [M, K / 16, 16].
            tokens: which of them count.
        """
        found = self.mean(tokens)
        size = found.shape[-1] // BLOCK
        squares = found.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None, None]
        tiled = found.reshape(-1, size, BLOCK, size, BLOCK)
        blocks = tiled.diagonal(dim1=1, dim2=3).movedim(-1, 1) / squares
        known = blocks.isfinite().flatten(1).all(dim=1)[:, None, None, None]
        identity = torch.eye(BLOCK, device=found.device)
        blocks = torch.where(known, blocks + RIDGE * identity, identity)
        return blocks if rule == "hessian" else blocks.diagonal(dim1=2, dim2=3).contiguous()

    def why_plain(self) -> tuple[str | None, ...]:
        """Of each matrix why codes cannot be fitted to these moments; None if they can."""
        finite = self.sums.isfinite().flatten(2).all(dim=2).all(dim=0)
        if self.layer_sums is not None and not self.sums.shape[1]:
            finite = self.layer_sums.isfinite().all().expand(self.tokens.shape[1])
        return tuple(map(_why_plain, finite.tolist(), *self.tokens.tolist()))

    def of(self, matrices: slice) -> "Moments":
        """Those of some matrices; views, no copies, and themselves where these are all."""
        if matrices == slice(0, self.tokens.shape[1]):
            return self
        return Moments(
            sums=self.sums[:, matrices],
            tokens=self.tokens[:, matrices],
            layer_sums=self.layer_sums,
            layer_tokens=self.layer_tokens,
        )

    def to(self, device: torch.device) -> "Moments":
        """The same on `device`; themselves where they are there."""
        if self.sums.device == device:
            return self
        shared = self.layer_sums, self.layer_tokens
        sums, tokens = (part if part is None else part.to(device) for part in shared)
        return Moments(
            sums=self.sums.to(device),
            tokens=self.tokens.to(device),
            layer_sums=sums,
            layer_tokens=tokens,
        )


def _why_plain(is_finite: bool, fitted: int, held_out: int) -> str | None:
    if not is_finite:
        return "the second moments of its inputs are not finite"
    if not fitted + held_out:
        return "calibration showed it no tokens"
    if fitted + held_out < FEWEST_TOKENS:
        return f"calibration showed it fewer than {FEWEST_TOKENS} tokens"
    if not fitted or not held_out:
        return "its calibration tokens cannot be parted into some to fit and some held out"
    return None


def known_or_identity(moments: Tensor) -> Tensor:
    """The means [M, K, K] of which a Cholesky factor may exist, the identity for the others."""
    known = moments.isfinite().flatten(1).all(dim=1)
    known &= moments.diagonal(dim1=1, dim2=2).sum(dim=1) > 0
    return torch.where(known[:, None, None], moments, identity_like(moments))


def identity_like(matrices: Tensor) -> Tensor:
    """[K, K] in the dtype and on the device of matrices [M, K, K]."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def _mean(sums: Tensor, tokens: Tensor) -> Tensor:
    return sums / tokens.clamp(min=1).to(sums)[..., None, None]
