"""Launches the Triton kernels on contiguous tensors of a GPU, or on CPU tensors when interpreted.

Triton's interpreter truncates float32 to bfloat16 and, up to 3.6, does not fuse `tl.fma`. Hence
interpreted kernels read and write float32, cast by torch, and divide instead of correcting.
"""

import os

import torch
import triton
from torch import Tensor

from autoquant_kernels import triton_kernels as kernels

BLOCK = 16
BLOCKS = 128
WIDE_BLOCKS = 256
WORDS = 256
ELEMENTS = 2048
VOCABULARY_TILE = 4096
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_BLOCKS = 4096

SAFE_SCALES = (2.0**-80, 2.0**80)
"""Global scales for which corrected division by any block scale neither over- nor underflows."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
PACK_OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}
KL_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def fake_quant_nvfp4(x: Tensor, global_scale: float, out: Tensor) -> None:
    """Dynamic NVFP4."""
    source, target = _plain(x), _target(out)
    blocks = x.numel() // BLOCK
    size = _blocks(BLOCKS)
    with _device(x):
        kernels.fake_quant_nvfp4[_grid(blocks, size)](
            source, target, blocks, global_scale, _divide(global_scale), size, **OPTIONS
        )
    _finish(target, out)


def fake_quant_nvfp4_weight(x: Tensor, global_scale: float, rule: str, out: Tensor) -> None:
    """Exported-form NVFP4."""
    source, target = _plain(x), _target(out)
    blocks = x.numel() // BLOCK
    size = _blocks(BLOCKS if rule == "max" else WIDE_BLOCKS)
    with _device(x):
        kernels.fake_quant_nvfp4_weight[_grid(blocks, size)](
            source, target, blocks, global_scale, rule, _divide(global_scale), size, **OPTIONS
        )
    _finish(target, out)


def quantize_nvfp4(
    x: Tensor, global_scale: float, rule: str, codes: Tensor, block_scale: Tensor
) -> None:
    """NVFP4 codes and block scales."""
    blocks = x.numel() // BLOCK
    size = _blocks(WIDE_BLOCKS)
    words, scales = codes.view(-1).view(torch.int32), block_scale.view(torch.uint8)
    divide = _divide(global_scale)
    with _device(x):
        kernels.quantize_nvfp4[_grid(blocks, size)](
            _plain(x), words, scales, blocks, global_scale, rule, divide, size, **PACK_OPTIONS
        )


def dequantize_nvfp4(codes: Tensor, block_scale: Tensor, global_scale: float, out: Tensor) -> None:
    """NVFP4 codes and block scales to numbers."""
    target = _target(out)
    words, scales = codes.view(-1).view(torch.int32), block_scale.view(torch.uint8)
    size = _blocks(WORDS)
    with _device(codes):
        kernels.dequantize_nvfp4[_grid(words.numel(), size)](
            words, scales, target, words.numel(), global_scale, size, **OPTIONS
        )
    _finish(target, out)


def fake_quant_fp8(x: Tensor, scale: float, out: Tensor) -> None:
    """FP8 there and back."""
    source, target = _plain(x), _target(out)
    with _device(x):
        kernels.fake_quant_fp8[_grid(x.numel(), _elements())](
            source, target, x.numel(), scale, *_fp8_division(scale), _elements(), **OPTIONS
        )
    _finish(target, out)


def quantize_fp8(x: Tensor, scale: float, codes: Tensor) -> None:
    """FP8 codes."""
    with _device(x):
        kernels.quantize_fp8[_grid(x.numel(), _elements())](
            _plain(x),
            codes.view(torch.uint8),
            x.numel(),
            scale,
            *_fp8_division(scale),
            _elements(),
            **OPTIONS,
        )


def dequantize_fp8(codes: Tensor, scale: float, out: Tensor) -> None:
    """FP8 codes to numbers."""
    target = _target(out)
    with _device(codes):
        kernels.dequantize_fp8[_grid(codes.numel(), _elements())](
            codes.view(torch.uint8), target, codes.numel(), scale, _elements(), **OPTIONS
        )
    _finish(target, out)


def token_kl(reference: Tensor, logits: Tensor, out: Tensor) -> None:
    """KL in nats of every row."""
    rows, vocabulary = logits.shape
    tile = min(VOCABULARY_TILE, triton.next_power_of_2(vocabulary))
    with _device(logits):
        kernels.token_kl[(rows,)](
            _plain(reference), _plain(logits), out, vocabulary, tile, **KL_OPTIONS
        )


def _grid(units: int, size: int) -> tuple[int]:
    return (triton.cdiv(units, size),)


def _blocks(size: int) -> int:
    return INTERPRETED_BLOCKS if INTERPRETED else size


def _elements() -> int:
    return INTERPRETED_BLOCKS * BLOCK if INTERPRETED else ELEMENTS


def _divide(scale: float) -> bool:
    return INTERPRETED or not SAFE_SCALES[0] <= scale <= SAFE_SCALES[1]


def _fp8_division(scale: float) -> tuple[float, bool]:
    return float(1 / torch.tensor(scale)), _divide(scale)


def _device(x: Tensor) -> torch.cuda.device:
    return torch.cuda.device(x.device if x.is_cuda else -1)


def _plain(x: Tensor) -> Tensor:
    return x.float() if INTERPRETED else x


def _target(out: Tensor) -> Tensor:
    return torch.empty_like(out, dtype=torch.float32) if INTERPRETED else out


def _finish(target: Tensor, out: Tensor) -> None:
    if INTERPRETED:
        out.copy_(target)
