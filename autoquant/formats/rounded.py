"""NVFP4 codes of several matrices, and what they do to products.

Shapes: M matrices with scales of their own, each of L linears one below the other, N outputs,
K inputs, B blocks of 16 of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import autoquant_kernels as kernels
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rounded:
    """Codes of M matrices."""

    codes: Tensor
    """uint8 [M, N, K / 2]."""
    block_scale: Tensor
    """float8_e4m3fn [M, N, B]."""

    def harm(
        self,
        weight: Tensor,
        scale: Tensor,
        moments: Tensor,
        rows: Sequence[int],
        pull: Tensor | None = None,
    ) -> Tensor:
        """tr(D H D^T) of each linear, D the error of the weights that engines multiply with.

        With a pull P, tr(D H D^T + 2 P D^T): the mean of |W x - (W - D) z|^2 over inputs z that
        have drifted from x, less what no code changes.

        Args:
            weight: BF16 [M, N, K].
            scale: global scales, float32 [M] on the host.
            moments: H, the mean x x^T of the inputs, float32 [M, K, K].
            rows: of each of the L linears; N in all.
            pull: W E[(x - z) z^T], float32 [M, N, K].

        Returns:
            Mean squared error of the products, summed over their outputs: float64 [M, L].
        """
        decoded = kernels.dequantize_nvfp4(self.codes, self.block_scale, scale)
        error = weight.float() - decoded.float()
        slope = error @ moments if pull is None else error @ moments + 2 * pull
        of_rows = (slope * error).sum(dim=2).double()
        return torch.stack([part.sum(dim=1) for part in of_rows.split(list(rows), dim=1)], dim=1)

    def where(self, chosen: Tensor, other: "Rounded") -> "Rounded":
        """These codes of the rows that are `chosen` [M, N], the other's of the rest."""
        own = chosen[:, :, None]
        scales = self.block_scale.view(torch.uint8), other.block_scale.view(torch.uint8)
        return Rounded(
            torch.where(own, self.codes, other.codes),
            torch.where(own, *scales).view(torch.float8_e4m3fn),
        )

    def parted(self, count: int) -> list["Rounded"]:
        """As many parts of equally many matrices; the inverse of `joined`."""
        parts = zip(self.codes.chunk(count), self.block_scale.chunk(count), strict=True)
        return [Rounded(codes, scales) for codes, scales in parts]

    @classmethod
    def joined(cls, parts: Sequence["Rounded"]) -> "Rounded":
        """One matrix after the other."""
        scales = torch.cat([part.block_scale.view(torch.uint8) for part in parts])
        return cls(torch.cat([part.codes for part in parts]), scales.view(torch.float8_e4m3fn))
