"""Launches the Triton kernels on contiguous tensors of a GPU, or on CPU tensors when interpreted.

Triton's interpreter truncates float32 to bfloat16 and, up to 3.6, does not fuse `tl.fma`. Hence
interpreted kernels read and write float32, cast by torch, and divide instead of correcting.
"""

import os
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor

from autoquant_kernels.gpu import compensated, fused

BLOCK = 16
BLOCKS = 128
WIDE_BLOCKS = 256
WEIGHTED_BLOCKS = 32
"""Moments leave a thread the registers of one block."""
WORDS = 256
ELEMENTS = 2048
ROWS = 32
VOCABULARY_TILE = 4096
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_BLOCKS = 4096

SAFE_SCALES = (2.0**-80, 2.0**80)
"""Global scales for which corrected division by any block scale neither over- nor underflows."""

SAFE_WEIGHT_SCALES = (2.0**-80, 2.0**-3)
"""Those for which besides no block but one of zeros has a scale that underflows to 0."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
PACK_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
KL_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def fake_quant_nvfp4(x: Tensor, scales: Sequence[float], out: Tensor) -> None:
    """Dynamic NVFP4."""
    source, target = _plain(x), _target(out)
    blocks = x.numel() // BLOCK // len(scales)
    size = _blocks(BLOCKS)
    g, many = _on_device(scales, x)
    sixth, divide = _block_division(scales, SAFE_SCALES)
    with _device(x):
        fused.fake_quant_nvfp4[_grid(blocks, size, scales)](
            source, target, blocks, g, sixth, divide, size, many, **OPTIONS
        )
    _finish(target, out)


def fake_quant_nvfp4_weight(
    x: Tensor, scales: Sequence[float], rule: str, moments: Tensor | None, out: Tensor
) -> None:
    """Exported-form NVFP4."""
    source, target = _plain(x), _target(out)
    blocks = x.numel() // BLOCK // len(scales)
    size = _blocks(WIDE_BLOCKS if rule in {"mse", "four_over_six"} else BLOCKS)
    g, many = _on_device(scales, x)
    sixth, divide = _block_division(scales, SAFE_WEIGHT_SCALES)
    weights = _moments(x, scales, moments)
    with _device(x):
        fused.fake_quant_nvfp4_weight[_grid(blocks, size, scales)](
            source, target, blocks, g, sixth, *weights, rule, divide, size, many, **OPTIONS
        )
    _finish(target, out)


def quantize_nvfp4(
    x: Tensor,
    scales: Sequence[float],
    rule: str,
    moments: Tensor | None,
    codes: Tensor,
    block_scale: Tensor,
) -> None:
    """NVFP4 codes and block scales."""
    blocks = x.numel() // BLOCK // len(scales)
    size = _blocks(BLOCKS if moments is None else WEIGHTED_BLOCKS)
    words, stored = codes.view(-1).view(torch.int32), block_scale.view(torch.uint8)
    g, many = _on_device(scales, x)
    sixth, divide = _block_division(scales, SAFE_WEIGHT_SCALES)
    with _device(x):
        fused.quantize_nvfp4[_grid(blocks, size, scales)](
            _plain(x),
            words,
            stored,
            blocks,
            g,
            sixth,
            *_moments(x, scales, moments),
            rule,
            divide,
            size,
            many,
            not INTERPRETED and x.dtype is torch.bfloat16 and x.data_ptr() % BLOCK == 0,
            **PACK_OPTIONS,
        )


def compensate_nvfp4(
    w: Tensor,
    upper: Tensor,
    scales: Sequence[float],
    rule: str,
    codes: Tensor,
    block_scale: Tensor,
    errors: Tensor,
) -> None:
    """NVFP4 codes, block scales and errors of all columns of each row."""
    rows, size = len(w) // len(scales), _blocks(ROWS)
    words, stored = codes.view(-1).view(torch.int32), block_scale.view(torch.uint8)
    diagonal = upper.diagonal(dim1=1, dim2=2)
    weights = diagonal.square().reciprocal().contiguous() if rule == "diagonal" else w
    g, many = _on_device(scales, w)
    sixth, divide = _block_division(scales, SAFE_WEIGHT_SCALES)
    with _device(w):
        compensated.compensate_nvfp4[_grid(rows, size, scales)](
            w,
            upper,
            diagonal.reciprocal().contiguous(),
            weights,
            words,
            stored,
            errors,
            rows,
            w.shape[1],
            g,
            sixth,
            rule,
            divide,
            size,
            many,
            **PACK_OPTIONS,
        )


def dequantize_nvfp4(
    codes: Tensor, block_scale: Tensor, scales: Sequence[float], out: Tensor
) -> None:
    """NVFP4 codes and block scales to numbers."""
    target = _target(out)
    words, stored = codes.view(-1).view(torch.int32), block_scale.view(torch.uint8)
    count = words.numel() // len(scales)
    size = _blocks(WORDS)
    g, many = _on_device(scales, codes)
    with _device(codes):
        fused.dequantize_nvfp4[_grid(count, size, scales)](
            words, stored, target, count, g, size, many, **OPTIONS
        )
    _finish(target, out)


def fake_quant_fp8(x: Tensor, scales: Sequence[float], out: Tensor) -> None:
    """FP8 there and back."""
    source, target = _plain(x), _target(out)
    count, size = x.numel() // len(scales), _elements()
    scale, many = _on_device(scales, x)
    division = _fp8_division(scales)
    with _device(x):
        fused.fake_quant_fp8[_grid(count, size, scales)](
            source, target, count, scale, *division, size, many, **OPTIONS
        )
    _finish(target, out)


def quantize_fp8(x: Tensor, scales: Sequence[float], codes: Tensor) -> None:
    """FP8 codes."""
    source, target = _plain(x), codes.view(torch.uint8)
    count, size = x.numel() // len(scales), _elements()
    scale, many = _on_device(scales, x)
    division = _fp8_division(scales)
    with _device(x):
        fused.quantize_fp8[_grid(count, size, scales)](
            source, target, count, scale, *division, size, many, **OPTIONS
        )


def compensate_fp8(
    w: Tensor, upper: Tensor, scales: Sequence[float], codes: Tensor, errors: Tensor
) -> None:
    """FP8 codes and errors of all columns of each row."""
    rows, size = len(w) // len(scales), _blocks(ROWS)
    over = upper.diagonal(dim1=1, dim2=2).reciprocal().contiguous()
    scale, many = _on_device(scales, w)
    division = _fp8_division(scales)
    with _device(w):
        compensated.compensate_fp8[_grid(rows, size, scales)](
            w,
            upper,
            over,
            codes.view(torch.uint8),
            errors,
            rows,
            w.shape[1],
            scale,
            *division,
            size,
            many,
            **PACK_OPTIONS,
        )


def dequantize_fp8(codes: Tensor, scales: Sequence[float], out: Tensor) -> None:
    """FP8 codes to numbers."""
    source, target = codes.view(torch.uint8), _target(out)
    count, size = codes.numel() // len(scales), _elements()
    scale, many = _on_device(scales, codes)
    with _device(codes):
        fused.dequantize_fp8[_grid(count, size, scales)](
            source, target, count, scale, size, many, **OPTIONS
        )
    _finish(target, out)


def token_kl(reference: Tensor, logits: Tensor, out: Tensor) -> None:
    """KL in nats of every row."""
    rows, vocabulary = logits.shape
    tile = min(VOCABULARY_TILE, triton.next_power_of_2(vocabulary))
    with _device(logits):
        fused.token_kl[(rows,)](
            _plain(reference), _plain(logits), out, vocabulary, tile, **KL_OPTIONS
        )


def _on_device(scales: Sequence[float], x: Tensor) -> tuple[float | Tensor, bool]:
    """What a kernel takes as its scale, and whether that points to one for each matrix."""
    if len(scales) == 1:
        return scales[0], False
    return _tensor(tuple(scales), x.device), True


@lru_cache(maxsize=64)
def _tensor(scales: tuple[float, ...], device: torch.device) -> Tensor:
    """Scales on a device, kept: to copy them there the host would wait for every kernel before."""
    return torch.tensor(scales, device=device)


def _moments(x: Tensor, scales: Sequence[float], moments: Tensor | None) -> tuple[Tensor, int, int]:
    """Moments `[P, K / 16, ...]`, blocks of a row, and how far apart those of two matrices are."""
    if moments is None:
        return x, 1, 0
    own = moments[0].numel() if len(moments) == len(scales) else 0
    return moments, moments.shape[1], own


def _grid(units: int, size: int, scales: Sequence[float]) -> tuple[int]:
    return (len(scales) * triton.cdiv(units, size),)


def _blocks(size: int) -> int:
    return INTERPRETED_BLOCKS if INTERPRETED else size


def _elements() -> int:
    return INTERPRETED_BLOCKS * BLOCK if INTERPRETED else ELEMENTS


def _block_division(scales: Sequence[float], safe: tuple[float, float]) -> tuple[float, bool]:
    """RN(1 / RN(6 g)) of a single scale, and whether the processor's own division is needed."""
    return float(1 / (torch.tensor(scales[0]) * 6)), _divide(scales, safe)


def _fp8_division(scales: Sequence[float]) -> tuple[float, bool]:
    return float(1 / torch.tensor(scales[0])), _divide(scales, SAFE_SCALES)


def _divide(scales: Sequence[float], safe: tuple[float, float]) -> bool:
    return INTERPRETED or min(scales) < safe[0] or max(scales) > safe[1]


def _device(x: Tensor) -> torch.cuda.device:
    return torch.cuda.device(x.device if x.is_cuda else -1)


def _plain(x: Tensor) -> Tensor:
    return x.float() if INTERPRETED else x


def _target(out: Tensor) -> Tensor:
    return torch.empty_like(out, dtype=torch.float32) if INTERPRETED else out


def _finish(target: Tensor, out: Tensor) -> None:
    if INTERPRETED:
        out.copy_(target)
