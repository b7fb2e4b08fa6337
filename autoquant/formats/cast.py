"""Codes that a source stores already, kept: the scales of both are powers of two.

A weight that is an E2M1 or E4M3 number times a power of two is one under every other power of two
too, as long as the exponent fits. So nothing is lost of MXFP4 weights in NVFP4, whose blocks are
half as long, and of E4M3 codes with powers of two for scales in FP8. What does not fit (blocks that
are 2^18 times smaller than the largest one in NVFP4, codes that become subnormal in FP8) is rounded
to the nearest.
"""

import autoquant_kernels as kernels
import torch
from torch import Tensor

NVFP4_BLOCK = 16
_LARGEST_BLOCK, _SMALLEST_BLOCK = 8, -9
"""Exponents of the powers of two among positive E4M3 numbers."""
_LARGEST_E2M1 = 2
"""Exponent of the largest E2M1 number, 1.5 x 4."""
_ROWS = 1 << 20
"""Blocks that are coded at once."""


def nvfp4_scale(amax: Tensor) -> Tensor:
    """The global scale under which the block of the largest magnitude has the scale 2^8.

    Args:
        amax: over the scale set, float32 on the CPU, 0-dimensional or [E]; 0 counts as 1.
    """
    exponent = _exponent(torch.where(amax == 0, 1.0, amax))
    return torch.exp2((exponent - _LARGEST_E2M1 - _LARGEST_BLOCK).float())


def fp8_scale(amax: Tensor) -> Tensor:
    """The least power of two under which E4M3 holds `amax`; shapes as for `nvfp4_scale`."""
    mantissa, exponent = torch.frexp(kernels.fp8_scale(amax))
    return torch.exp2((exponent - (mantissa == 0.5).int()).float())


def to_nvfp4(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and block scales of a BF16 weight under powers of two.

    Args:
        weight: [N, K], or [E, N, K] with a scale for each.
        scale: from `nvfp4_scale`.

    Returns:
        uint8 [..., K / 2], the even column in the low nibble, and float8_e4m3fn [..., K / 16].
    """
    stored = weight.shape[:-1]
    matrices = weight if weight.ndim == 3 else weight[None]
    coded = [
        _matrix(own.reshape(-1, NVFP4_BLOCK), one)
        for own, one in zip(matrices, scale.reshape(-1).tolist(), strict=True)
    ]
    codes, scales = (torch.stack(parts) for parts in zip(*coded, strict=True))
    return codes.view(*stored, -1), scales.view(torch.float8_e4m3fn).view(*stored, -1)


def _matrix(blocks: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Codes [B, 8] and E4M3 bytes [B] of B blocks."""
    parts = [_coded(own, scale) for own in blocks.split(_ROWS)]
    codes, scales = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scales)


def _coded(blocks: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    numbers = blocks.float()
    wanted = _exponent(numbers.abs().amax(dim=1)) - _LARGEST_E2M1 - _exponent(torch.tensor(scale))
    exponent = wanted.clamp(_SMALLEST_BLOCK, _LARGEST_BLOCK).float()
    block_scale = torch.exp2(exponent)
    codes = _e2m1_codes(numbers, (block_scale * scale)[:, None])
    stored = block_scale.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), stored


def _e2m1_codes(numbers: Tensor, scale: Tensor) -> Tensor:
    """uint8 codes nearest to BF16 numbers over powers of two, which divide exactly; even on ties.

    A code between two powers of two is linear in its number, and the least of three such lines.
    """
    v = (numbers / scale).abs().nan_to_num(0.0).clamp(max=6)
    code = torch.minimum(2 * v, torch.minimum(v + 2, v / 2 + 4)).round()
    return code.to(torch.uint8) | (numbers < 0).to(torch.uint8) << 3


def _exponent(value: Tensor) -> Tensor:
    """floor(log2(value)), int32; -1 for 0."""
    return torch.frexp(value).exponent - 1
