"""How much each row that a weight multiplies counts in the second moments of its inputs.

Shapes: S sequences, M matrices that read an input set (one weight, or an expert each), R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor

Squares = tuple[Tensor, tuple[int, ...]]
"""Of one sequence: squared norms of gradients at the rows of one matrix after the other, float32
[R], and how many each has."""


@dataclass(frozen=True, slots=True, eq=False)
class RowWeights:
    """Of the rows of one input set, 1 in the mean."""

    values: Tensor
    """float32 [R], on the host: those of a sequence behind each other, matrix after matrix."""
    rows: Tensor
    """How many each matrix multiplies in each sequence, int64 [S, M]."""
    _spans: list[tuple[int, int]] = field(init=False, repr=False)
    """Of each matrix in each sequence."""

    def __post_init__(self) -> None:
        ends = accumulate(self.rows.flatten().tolist(), initial=0)
        object.__setattr__(self, "_spans", [*pairwise(ends)])

    @classmethod
    def of_squares(cls, squares: Sequence[Squares]) -> Self | None:
        """Weights by the size of gradients; None where these are not finite, or all zero.

        Args:
            squares: of each sequence.
        """
        matrices = max((len(sizes) for _, sizes in squares), default=0)
        padded = [[*sizes, *[0] * (matrices - len(sizes))] for _, sizes in squares]
        norms = torch.cat([torch.zeros(0), *(values for values, _ in squares)]).sqrt()
        mean = norms.double().mean()
        if not mean.isfinite() or mean == 0:
            return None
        return cls((norms / mean).float(), torch.tensor(padded))

    def of(self, sequence: int, matrix: int) -> Tensor:
        """Of the rows that a matrix multiplies in one sequence, in their order, float32 [r]; none
        of a matrix behind the last one that a gradient has reached.
        """
        if matrix >= self.rows.shape[1]:
            return self.values[:0]
        first, last = self._spans[sequence * self.rows.shape[1] + matrix]
        return self.values[first:last]
