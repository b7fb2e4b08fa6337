"""NVFP4 and FP8 in plain PyTorch: the oracle that every other backend matches bit for bit.

All arithmetic is IEEE float32, each operation rounded once to nearest even (RN). Rounding to E2M1
or E4M3 adds and subtracts 1.5 * 2^k, with k chosen so that one unit in the last place of the sum is
one step of the target format. Tensors are worked on in chunks that stay in the CPU's cache.

Every function takes contiguous tensors, scales that are already positive finite float32 values (one
for the whole tensor, or one for each of as many equal parts), and the tensors that it writes.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 16
CHUNK_BLOCKS = 1 << 14
KL_CHUNK_ELEMENTS = 1 << 20

MSE_CODES_BELOW = 3
MSE_CODES_ABOVE = 8
"""The `mse` rule tries the E4M3 codes from 3 below to 8 above the code of the largest magnitude.

Against a sweep of all 126 codes this loses nothing on normal, uniform, Laplace, Student-t and
log-normal blocks (`tests/kernels/test_scale_rules.py`).
"""

SMALLEST_E4M3 = 2.0**-9
LARGEST_E4M3 = 448.0
LARGEST_E2M1 = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_EXPONENT = 0x7F800000
_HALF_UNIT = 0x400000


def round_e2m1(v: Tensor) -> Tensor:
    """`v` rounded to the nearest E2M1 number, ties to even, saturating at +-6; NaN stays NaN."""
    v = v.clamp(-LARGEST_E2M1, LARGEST_E2M1)
    return _round_at(v, smallest_exponent=127, step_shift=22)


def round_e4m3(t: Tensor) -> Tensor:
    """`t` rounded to the nearest E4M3 number, ties to even, saturating at +-448; NaN stays NaN."""
    t = t.clamp(-LARGEST_E4M3, LARGEST_E4M3)
    return _round_at(t, smallest_exponent=121, step_shift=20)


def _round_at(v: Tensor, *, smallest_exponent: int, step_shift: int) -> Tensor:
    bits = (v.view(torch.int32) & _EXPONENT).clamp_(min=smallest_exponent << 23)
    magic = bits.add_((step_shift << 23) + _HALF_UNIT).view(torch.float32)
    return (v + magic).sub_(magic)


def fake_quant_nvfp4(x: Tensor, scales: Sequence[float], out: Tensor) -> None:
    """Write `x` rounded through NVFP4 with block scales taken from the data (activations)."""
    views = x.view(-1, BLOCK), out.view(-1, BLOCK)
    for g, source, target in _scaled_chunks(scales, CHUNK_BLOCKS, *views):
        blocks = source.float()
        scale = round_e4m3(_largest(blocks) / (g * 6)) * g
        q = round_e2m1(blocks / _divisor(scale))
        target.copy_(torch.copysign(q * scale, blocks))


def fake_quant_nvfp4_weight(x: Tensor, scales: Sequence[float], rule: str, out: Tensor) -> None:
    """Write what `dequantize_nvfp4(quantize_nvfp4(x))` gives, without storing the codes."""
    views = x.view(-1, BLOCK), out.view(-1, BLOCK)
    for g, source, target in _scaled_chunks(scales, CHUNK_BLOCKS, *views):
        blocks = source.float() + 0.0
        scale = _block_scales(blocks, g, rule) * g
        target.copy_(torch.copysign(_nearest(blocks, scale), blocks))


def quantize_nvfp4(
    x: Tensor, scales: Sequence[float], rule: str, codes: Tensor, block_scale: Tensor
) -> None:
    """Write the packed E2M1 codes (even column in the low nibble) and the E4M3 block scales."""
    views = x.view(-1, BLOCK), codes.view(-1, BLOCK // 2), block_scale.view(-1, 1)
    values = torch.tensor(E2M1_VALUES, device=x.device)
    for g, source, packed, stored in _scaled_chunks(scales, CHUNK_BLOCKS, *views):
        blocks = source.float()
        scale = _block_scales(blocks, g, rule)
        q = round_e2m1(blocks / _divisor(scale * g)).abs_().nan_to_num_(0.0)
        magnitude = torch.searchsorted(values, q, out_int32=True)
        sign = (blocks < 0) & ~scale.isnan()
        code = (magnitude + (sign << 3)).to(torch.uint8)
        packed.copy_(code[:, 0::2] | (code[:, 1::2] << 4))
        stored.copy_(scale.to(torch.float8_e4m3fn))


def dequantize_nvfp4(
    codes: Tensor, block_scale: Tensor, scales: Sequence[float], out: Tensor
) -> None:
    """Write E2M1 code x RN(block scale x global scale)."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=codes.device)
    views = codes.view(-1, BLOCK // 2), block_scale.view(-1, 1), out.view(-1, BLOCK)
    for g, packed, stored, target in _scaled_chunks(scales, CHUNK_BLOCKS, *views):
        code = torch.stack((packed & 15, packed >> 4), dim=-1).view(-1, BLOCK)
        target.copy_(table[code.int()] * (stored.float() * g))


def fake_quant_fp8(x: Tensor, scales: Sequence[float], out: Tensor) -> None:
    """Write `x` rounded through E4M3."""
    views = x.view(-1), out.view(-1)
    for s, source, target in _scaled_chunks(scales, CHUNK_BLOCKS * BLOCK, *views):
        values = source.float()
        target.copy_(torch.copysign(round_e4m3(values / s) * s, values))


def quantize_fp8(x: Tensor, scales: Sequence[float], codes: Tensor) -> None:
    """Write the E4M3 codes; a NaN becomes 0x7F."""
    views = x.view(-1), codes.view(-1)
    for s, source, target in _scaled_chunks(scales, CHUNK_BLOCKS * BLOCK, *views):
        values = source.float()
        q = torch.copysign(round_e4m3(values / s), values)
        target.copy_(q.masked_fill_(values.isnan(), torch.nan).to(torch.float8_e4m3fn))


def dequantize_fp8(codes: Tensor, scales: Sequence[float], out: Tensor) -> None:
    """Write E4M3 code x scale."""
    views = codes.view(-1), out.view(-1)
    for s, source, target in _scaled_chunks(scales, CHUNK_BLOCKS * BLOCK, *views):
        target.copy_(source.float() * s)


def token_kl(reference: Tensor, logits: Tensor, out: Tensor) -> None:
    """Write KL(softmax(reference) || softmax(logits)) per row, in nats, computed in float64."""
    rows = max(1, KL_CHUNK_ELEMENTS // max(1, reference.shape[1]))
    for p_logits, q_logits, target in _chunks(rows, reference, logits, out):
        log_p = torch.log_softmax(p_logits.double(), dim=-1)
        log_q = torch.log_softmax(q_logits.double(), dim=-1)
        p = log_p.exp()
        terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
        target.copy_(terms.sum(dim=-1).clamp_(min=0.0))


def _scaled_chunks(
    scales: Sequence[float], rows: int, *tensors: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of as many equal parts as there are scales, each after its part's scale."""
    size = tensors[0].shape[0] // len(scales)
    for part, scale in enumerate(scales):
        value = torch.tensor(scale, device=tensors[0].device)
        own = (t[part * size : (part + 1) * size] for t in tensors)
        for chunk in _chunks(rows, *own):
            yield value, *chunk


def _chunks(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, tensors[0].shape[0], rows):
        yield tuple(t[start : start + rows] for t in tensors)


def _largest(blocks: Tensor) -> Tensor:
    return blocks.abs().amax(dim=-1, keepdim=True)


def _divisor(scale: Tensor) -> Tensor:
    """A block whose scale underflows to 0 holds zeros whatever it is divided by."""
    return scale.masked_fill(scale == 0, 1.0)


def _nearest(blocks: Tensor, scale: Tensor) -> Tensor:
    return round_e2m1(blocks / _divisor(scale)).mul_(scale)


def _block_scales(blocks: Tensor, g: Tensor, rule: str) -> Tensor:
    """E4M3 block scales `[blocks, 1]` as float32; NaN for a block that holds a NaN."""
    amax = _largest(blocks)
    exact = amax / (g * 6)
    scale = _stored_scale(exact)
    if rule == "mse":
        best = _best_in_window(blocks, scale, g)
    elif rule == "four_over_six":
        best = _four_or_six(blocks, scale, _stored_scale(amax * 1.5 / (g * 6)), g)
    else:
        best = scale
    return torch.where(exact == 0, 1.0, best)


def _stored_scale(exact: Tensor) -> Tensor:
    return round_e4m3(exact.clamp(SMALLEST_E4M3, LARGEST_E4M3))


def _four_or_six(blocks: Tensor, six: Tensor, four: Tensor, g: Tensor) -> Tensor:
    four_is_better = _squared_error(blocks, four * g) < _squared_error(blocks, six * g)
    return torch.where(four_is_better, four, six)


def _best_in_window(blocks: Tensor, scale: Tensor, g: Tensor) -> Tensor:
    code = scale.to(torch.float8_e4m3fn).view(torch.uint8).short()
    best, least = scale, torch.empty_like(scale)
    for offset in range(-MSE_CODES_BELOW, MSE_CODES_ABOVE + 1):
        candidate = (code + offset).clamp_(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).float()
        error = _squared_error(blocks, candidate * g)
        better = (error < least) | (offset == -MSE_CODES_BELOW)
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return torch.where(scale.isnan(), scale, best)


def _squared_error(blocks: Tensor, scale: Tensor) -> Tensor:
    """Sum of squares of RN(dequantized - w), added in a fixed order: i + (i + 8), then 4, 2, 1."""
    terms = (_nearest(blocks, scale) - blocks).square_()
    for half in (8, 4, 2, 1):
        terms = terms[:, :half] + terms[:, half:]
    return terms
