"""Whether stored codes are the nearest to a weight that their scales allow.

Written from the formats' definition, apart from the kernels that made the codes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.formats import CODES, GLOBAL_SCALE, SCALE
from autoquant.formats.packed import Packed

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_REACH = (0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0)
"""Largest distance of a number to the code that is nearest to it, below saturation."""
_E4M3_REACH, _E4M3_SMALLEST_REACH = 2.0**-4, 2.0**-10
_LARGEST = {"e2m1": 6.0, "e4m3": 448.0}
_SLACK = 1 + 2.0**-5
"""Room for the rounding of the quotient that was coded, which some tools hold in BF16."""

_CHUNK_ELEMENTS = 1 << 18
"""Chunks stay in the processor's cache."""


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

    def add(self, weight: Tensor, decoded: Tensor, reach: Tensor, largest: Tensor) -> None:
        """Count one chunk; float32, `largest` being the number that codes saturate at."""
        difference = weight - decoded
        self.squared_error += torch.linalg.vector_norm(difference).item() ** 2
        self.squared_norm += torch.linalg.vector_norm(weight).item() ** 2
        far = ~(difference.abs_() <= reach)
        if far.any():
            saturated = (decoded.abs() >= largest) & (weight * decoded.sign() >= decoded.abs())
            self.wrong += int((far & ~saturated).sum())


def distance_of(weight: Tensor, packed: Packed) -> Distance:
    """Compare a source weight [N, K] with its codes, by the kind of the codes."""
    parts = packed.parts
    if parts[CODES].dtype is torch.uint8:
        return e2m1_distance(weight, parts[CODES], parts[SCALE], parts[GLOBAL_SCALE])
    return e4m3_distance(weight, parts[CODES], parts[SCALE])


def e2m1_distance(
    weight: Tensor, codes: Tensor, block_scale: Tensor, global_scale: Tensor
) -> Distance:
    """Compare [N, K] with packed codes [N, K/2] and E4M3 scales [N, K/B] of blocks of B."""
    signed = torch.tensor(_E2M1 + tuple(-value for value in _E2M1))
    values, reaches = _by_byte(signed), _by_byte(torch.tensor(_E2M1_REACH * 2) * _SLACK)
    distance = Distance()
    for rows in _row_chunks(weight):
        packed = codes[rows].flatten().int()
        scale = (block_scale[rows].float() * global_scale).unsqueeze(-1)
        shape = (*scale.shape[:2], -1)
        decoded = values.index_select(0, packed).view(torch.float32).view(shape) * scale
        reach = reaches.index_select(0, packed).view(torch.float32).view(shape) * scale
        largest = _LARGEST["e2m1"] * scale
        distance.add(weight[rows].float().view(shape), decoded, reach, largest)
    return distance


def e4m3_distance(weight: Tensor, codes: Tensor, scale: Tensor) -> Distance:
    """Compare [N, K] with E4M3 codes [N, K]."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = every * scale
    reaches = (every.abs() * _E4M3_REACH).clamp(min=_E4M3_SMALLEST_REACH) * (scale * _SLACK)
    distance = Distance()
    for rows in _row_chunks(weight):
        code = codes[rows].view(torch.uint8).flatten().int()
        decoded, reach = (table.index_select(0, code) for table in (values, reaches))
        distance.add(weight[rows].flatten().float(), decoded, reach, _LARGEST["e4m3"] * scale)
    return distance


def _by_byte(of_nibble: Tensor) -> Tensor:
    """Two float32 values by the byte that holds their nibbles, low first: int64 [256]."""
    byte = torch.arange(256)
    return torch.stack((of_nibble[byte & 15], of_nibble[byte >> 4]), dim=-1).view(torch.int64)[:, 0]


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))
