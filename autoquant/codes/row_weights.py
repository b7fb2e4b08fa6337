"""How much each row that a weight multiplies counts in the second moments of its inputs.

Shapes: S sequences, M matrices that read an input set (one weight, or an expert each), R rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RowWeights:
    """Of the rows of one input set, 1 in the mean."""

    values: Tensor
    """float32 [R], on the host: those of a sequence behind each other, matrix after matrix."""
    rows: Tensor
    """How many each matrix multiplies in each sequence, int64 [S, M]."""

    @classmethod
    def of_squares(cls, squares: Sequence[Mapping[int, Tensor]]) -> Self | None:
        """Weights by the size of gradients; None where these are not finite, or all zero.

        Args:
            squares: of each sequence, the squared norms of the gradients at the rows of each
                matrix, float32 [r].
        """
        matrices = 1 + max((matrix for own in squares for matrix in own), default=0)
        parts = [own.get(m, torch.zeros(0)) for own in squares for m in range(matrices)]
        sizes = torch.tensor([len(part) for part in parts]).view(len(squares), matrices)
        norms = torch.cat(parts).sqrt() if parts else torch.zeros(0)
        mean = norms.double().mean()
        if not mean.isfinite() or mean == 0:
            return None
        return cls((norms / mean).float(), sizes)

    def of(self, sequence: int, matrix: int) -> Tensor:
        """Of the rows that a matrix multiplies in one sequence, in their order, float32 [r]."""
        place = sequence * self.rows.shape[1] + matrix
        ends = self.rows.flatten().cumsum(0)
        last = int(ends[place])
        return self.values[last - int(self.rows.flatten()[place]) : last]
