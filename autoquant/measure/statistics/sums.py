"""Sums of products of inputs, in float32, of one input set.

Shapes: R rows that a weight multiplies, M matrices (one weight, or an expert each), K inputs.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from autoquant.codes.statistics_size import PARTS, kept_matrices
from autoquant.formats.moments import Moments
from autoquant.measure.statistics.taps import InputSetShape


@dataclass(slots=True)
class Sums:
    """What one input set has shown so far."""

    sums: Tensor
    """float32 [2, M, K, K], or [2, 1, K, K] for all experts of a layer together."""
    tokens: list[list[int]]
    """[2, M]."""
    of_experts: bool

    @classmethod
    def zeros(cls, shape: InputSetShape) -> Self:
        kept = kept_matrices(shape.experts, shape.inputs)
        sums = torch.zeros(PARTS, kept, shape.inputs, shape.inputs, device=shape.device)
        tokens = [[0] * (shape.experts or 1) for _ in range(PARTS)]
        return cls(sums, tokens, shape.experts is not None)

    @property
    def of_layer(self) -> bool:
        """Whether experts share their sums."""
        return self.sums.shape[1] < len(self.tokens[0])

    def add(self, left: Tensor, right: Tensor, part: int, matrix: int) -> None:
        """Add the products of two times R rows, float32 [R, K]."""
        if len(right):
            self.sums[part, 0 if self.of_layer else matrix].addmm_(left.t(), right)
            self.tokens[part][matrix] += len(right)

    def moments(self) -> Moments:
        """The sums, those of experts with those of their layer."""
        tokens = torch.tensor(self.tokens)
        if not self.of_experts:
            return Moments(sums=self.sums, tokens=tokens)
        if self.of_layer:
            return Moments(
                sums=self.sums[:, :0],
                tokens=tokens,
                layer_sums=self.sums[:, 0],
                layer_tokens=tokens.sum(dim=1),
            )
        finite = self.sums.isfinite().flatten(2).all(dim=2)[:, :, None, None]
        return Moments(
            sums=self.sums,
            tokens=tokens,
            layer_sums=self.sums.where(finite, 0.0).sum(dim=1),
            layer_tokens=tokens.where(finite[:, :, 0, 0].cpu(), 0).sum(dim=1),
        )
