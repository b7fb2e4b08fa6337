"""Whether stored codes are the nearest to a weight that their scales allow.

Written from the formats' definition, apart from the kernels that made the codes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.formats import NVFP4_BLOCK

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_REACH = (0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0)
"""Largest distance of a number to the code that is nearest to it, below saturation."""
_E4M3_REACH, _E4M3_SMALLEST_REACH = 2.0**-4, 2.0**-10
_SLACK = 1 + 2.0**-5
"""Room for the rounding of the quotient that was coded, which some tools hold in BF16."""

_CHUNK_ELEMENTS = 1 << 22


@dataclass(slots=True)
class Distance:
    """How far decoded weights are from the source, gathered chunk by chunk."""

    squared_error: float = 0.0
    squared_norm: float = 0.0
    wrong: int = 0
    """Elements that another code would have been nearer to."""

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the difference over that of the source."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0

    def add(self, weight: Tensor, decoded: Tensor, reach: Tensor, saturated: Tensor) -> None:
        """Count one chunk; all float32 of one shape, `saturated` boolean."""
        difference = (weight - decoded).abs()
        beyond = saturated & (weight * decoded.sign() >= decoded.abs())
        self.wrong += int((~(difference <= reach * _SLACK) & ~beyond).sum())
        self.squared_error += difference.double().square().sum().item()
        self.squared_norm += weight.double().square().sum().item()


def nvfp4_distance(
    weight: Tensor, codes: Tensor, block_scale: Tensor, global_scale: Tensor
) -> Distance:
    """Compare [N, K] with packed codes [N, K/2] and E4M3 block scales [N, K/16]."""
    values, reaches = torch.tensor(_E2M1), torch.tensor(_E2M1_REACH)
    distance = Distance()
    for rows in _row_chunks(weight):
        packed = codes[rows]
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).int()
        scale = (block_scale[rows].float() * global_scale).repeat_interleave(NVFP4_BLOCK, dim=1)
        magnitude = nibbles & 7
        decoded = torch.where(nibbles > 7, -values[magnitude], values[magnitude]) * scale
        distance.add(weight[rows].float(), decoded, reaches[magnitude] * scale, magnitude == 7)
    return distance


def fp8_distance(weight: Tensor, codes: Tensor, scale: Tensor) -> Distance:
    """Compare [N, K] with E4M3 codes [N, K]."""
    distance = Distance()
    for rows in _row_chunks(weight):
        code = codes[rows].float()
        reach = (code.abs() * _E4M3_REACH).clamp(min=_E4M3_SMALLEST_REACH) * scale
        distance.add(weight[rows].float(), code * scale, reach, code.abs() == 448)
    return distance


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))
