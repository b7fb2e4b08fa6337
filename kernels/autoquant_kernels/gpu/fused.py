# mypy: ignore-errors
"""NVFP4, FP8 and token-KL kernels in Triton, for GPUs from sm_80 on and for Triton's interpreter.

Kernels that quantize load the two halves of their blocks of 16 as `[BLOCKS, 8]` tensors: a thread
then holds whole blocks, and maxima and sums need no exchange between threads. Kernels must be
compiled with `enable_fp_fusion=False`. Scales become tensors because the interpreter keeps numbers
as float64. With `MANY` a tensor is a row of equal matrices, and `g` or `scale` points to one scale
for each of them; sizes are then those of one matrix.
"""

import triton
import triton.language as tl

from autoquant_kernels.gpu.parts import (
    _blocks,
    _columns,
    _divisor,
    _e4m3_code,
    _e4m3_number,
    _largest,
    _load,
    _load_pairs,
    _nearest,
    _reciprocal,
    _round_e4m3,
    _share,
    _sixths,
    _store,
    _weight_magnitudes,
    _weight_scale,
    _with_sign_of,
)


@triton.jit
def _moments_at(m_ptr, block, blocks, row_blocks, part_moments, RULE: tl.constexpr):
    """Offsets `[BLOCKS, 1]` of the moments of each block; `blocks` are those of a matrix."""
    part = block // blocks
    size: tl.constexpr = 256 if RULE == "hessian" else 16
    return part * part_moments + (block - part * blocks) % row_blocks * size


@triton.jit
def fake_quant_nvfp4(
    x_ptr,
    out_ptr,
    blocks,
    g,
    sixth,
    DIVIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    MANY: tl.constexpr,
):
    """Dynamic NVFP4 of `blocks` blocks."""
    g, block, exists = _blocks(g, blocks, BLOCKS, MANY)
    sixth = _reciprocal(g * 6.0, sixth, DIVIDE, MANY)
    low, high = _load(x_ptr, block, exists)
    scale = _round_e4m3(_sixths(_largest(low, high), g, sixth, DIVIDE)) * g
    low_y, high_y = _nearest(low, high, scale, DIVIDE)
    _store(out_ptr, block, exists, _with_sign_of(low_y, low), _with_sign_of(high_y, high))


@triton.jit
def fake_quant_nvfp4_weight(
    x_ptr,
    out_ptr,
    blocks,
    g,
    sixth,
    m_ptr,
    row_blocks,
    part_moments,
    RULE: tl.constexpr,
    DIVIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    MANY: tl.constexpr,
):
    """The exported form of a weight, dequantized."""
    g, block, exists = _blocks(g, blocks, BLOCKS, MANY)
    sixth = _reciprocal(g * 6.0, sixth, DIVIDE, MANY)
    low, high = _load(x_ptr, block, exists)
    at = _moments_at(m_ptr, block, blocks, row_blocks, part_moments, RULE)
    low_y, high_y = _weight_magnitudes(low, high, g, sixth, m_ptr, at, exists, RULE, DIVIDE)
    low_y, high_y = _with_sign_of(low_y, low + 0.0), _with_sign_of(high_y, high + 0.0)
    _store(out_ptr, block, exists, low_y, high_y)


@triton.jit
def _joined_sums(v):
    """v0 + 16 v1 + ... + 16^7 v7 of the columns, modulo 2^32."""
    v0, v1, v2, v3, v4, v5, v6, v7 = _columns(v.to(tl.uint32, bitcast=True))
    word = (v7 * 16 + v6) * 16 + v5
    word = ((word * 16 + v4) * 16 + v3) * 16 + v2
    return (word * 16 + v1) * 16 + v0


@triton.jit
def _joined_signs(v):
    """The sign of column i in bit 4 i + 3. Shifting in four bits is one instruction."""
    v0, v1, v2, v3, v4, v5, v6, v7 = _columns(v.to(tl.uint32, bitcast=True))
    word = v7 >> 28
    word = (word << 4) | (v6 >> 28)
    word = (word << 4) | (v5 >> 28)
    word = (word << 4) | (v4 >> 28)
    word = (word << 4) | (v3 >> 28)
    word = (word << 4) | (v2 >> 28)
    word = (word << 4) | (v1 >> 28)
    word = (word << 4) | (v0 >> 28)
    return word & 0x88888888


@triton.jit
def _packed(x, scale, DIVIDE: tl.constexpr):
    """The codes of `[BLOCKS, 8]` elements as `[BLOCKS, 1]` words, the first in the low nibble.

    The code of v in [0, 6] is min(2 v, v + 2, v / 2 + 4) rounded to nearest even: each term is the
    code between two powers of two. Adding 1.5 x 2^23 rounds it.
    """
    safe, reciprocal, _ = _divisor(scale, DIVIDE)
    if DIVIDE:
        signed = x + 0.0
        quotient = tl.div_rn(signed, safe)
    else:
        signed = tl.fma(x, reciprocal, 0.0)  # -0.0 becomes 0.0
        quotient = tl.fma(tl.fma(signed, -safe, x), reciprocal, signed)
    v = tl.minimum(tl.abs(quotient), 6.0)
    code = tl.minimum(v + 12582914.0, tl.fma(v, 0.5, 12582916.0))
    code = tl.minimum(tl.fma(v, 2.0, 12582912.0), code)
    word = (_joined_sums(code) - 0x3F400000) | _joined_signs(signed)
    return tl.where(scale != scale, 0, word)


@triton.jit
def quantize_nvfp4(
    x_ptr,
    words_ptr,
    scales_ptr,
    blocks,
    g,
    sixth,
    m_ptr,
    row_blocks,
    part_moments,
    RULE: tl.constexpr,
    DIVIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    MANY: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Eight codes to a word, two words and an E4M3 scale to a block."""
    g, block, exists = _blocks(g, blocks, BLOCKS, MANY)
    sixth = _reciprocal(g * 6.0, sixth, DIVIDE, MANY)
    if PAIRS:
        low, high = _load_pairs(x_ptr, block, exists)
    else:
        low, high = _load(x_ptr, block, exists)
    at = _moments_at(m_ptr, block, blocks, row_blocks, part_moments, RULE)
    scale = _weight_scale(low, high, g, sixth, m_ptr, at, exists, RULE, DIVIDE)
    tl.store(scales_ptr + block, _e4m3_code(scale).to(tl.uint8), mask=exists)
    low_word = _packed(low, scale * g, DIVIDE)
    high_word = _packed(high, scale * g, DIVIDE)
    words = tl.reshape(tl.join(low_word, high_word), (BLOCKS, 2))
    tl.store(words_ptr + block * 2 + tl.arange(0, 2)[None, :], words, mask=exists)


@triton.jit
def _e2m1_number(code):
    """Codes in the low 4 bits; the subnormal float32 with a code's bits is its number x 2^-126."""
    number = ((code & 7) << 22) | ((code & 8) << 28)
    return number.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def dequantize_nvfp4(
    words_ptr, scales_ptr, out_ptr, words, g, WORDS: tl.constexpr, MANY: tl.constexpr
):
    """A thread turns a word of 8 codes into 8 neighbours; two words share a block scale."""
    g, first, left = _share(g, words, WORDS, MANY)
    g = tl.full((1,), g, tl.float32)
    at = first + tl.arange(0, WORDS)
    at = tl.max_contiguous(at, 1)  # one word per load, or its layout and the result's would differ
    exists = tl.arange(0, WORDS) < left
    word = tl.load(words_ptr + at, mask=exists, other=0)
    code = tl.load(scales_ptr + at // 2, mask=exists, other=0).to(tl.int32)
    scale = _e4m3_number(code) * g
    column = tl.arange(0, 8)[None, :]
    y = _e2m1_number(word[:, None] >> (4 * column)) * scale[:, None]
    first = out_ptr + at[:, None] * 8 + column
    tl.store(first, y.to(out_ptr.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _elements(scale, n, ELEMENTS: tl.constexpr, MANY: tl.constexpr):
    """The scale `[1]`, offsets `[ELEMENTS]` of this program's elements, and which exist."""
    scale, first, left = _share(scale, n, ELEMENTS, MANY)
    number = tl.arange(0, ELEMENTS)
    return tl.full((1,), scale, tl.float32), first + number, number < left


@triton.jit
def _fp8_magnitude(x, scale, reciprocal, DIVIDE: tl.constexpr):
    """|x| / scale rounded to E4M3, at most 448; NaN stays NaN."""
    limit = scale * 448.0
    magnitude = tl.minimum(tl.abs(x), limit, propagate_nan=tl.PropagateNan.ALL)
    if DIVIDE:
        v = tl.div_rn(magnitude, scale)
    else:
        guess = magnitude * reciprocal
        v = tl.fma(tl.fma(guess, -scale, magnitude), reciprocal, guess)
    return _round_e4m3(v)


@triton.jit
def fake_quant_fp8(
    x_ptr,
    out_ptr,
    n,
    scale,
    reciprocal,
    DIVIDE: tl.constexpr,
    ELEMENTS: tl.constexpr,
    MANY: tl.constexpr,
):
    """FP8 there and back."""
    scale, at, exists = _elements(scale, n, ELEMENTS, MANY)
    x = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32)
    y = _fp8_magnitude(x, scale, _reciprocal(scale, reciprocal, DIVIDE, MANY), DIVIDE) * scale
    tl.store(out_ptr + at, _with_sign_of(y, x).to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def quantize_fp8(
    x_ptr,
    codes_ptr,
    n,
    scale,
    reciprocal,
    DIVIDE: tl.constexpr,
    ELEMENTS: tl.constexpr,
    MANY: tl.constexpr,
):
    """FP8 codes."""
    scale, at, exists = _elements(scale, n, ELEMENTS, MANY)
    x = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32)
    code = _e4m3_code(
        _fp8_magnitude(x, scale, _reciprocal(scale, reciprocal, DIVIDE, MANY), DIVIDE)
    )
    sign = (x.to(tl.int32, bitcast=True) >> 24) & tl.where(x != x, 0, 0x80)
    tl.store(codes_ptr + at, (code | sign).to(tl.uint8), mask=exists)


@triton.jit
def dequantize_fp8(codes_ptr, out_ptr, n, scale, ELEMENTS: tl.constexpr, MANY: tl.constexpr):
    """FP8 codes to numbers."""
    scale, at, exists = _elements(scale, n, ELEMENTS, MANY)
    code = tl.load(codes_ptr + at, mask=exists, other=0).to(tl.int32)
    y = _e4m3_number(code) * scale
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _finite_or_zero(maximum):
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _rescaling(old, new):
    return tl.where(old == new, 1.0, tl.exp(old - new))


@triton.jit
def token_kl(p_ptr, q_ptr, out_ptr, VOCABULARY: tl.constexpr, TILE: tl.constexpr):
    """One row in one pass: running maxima, sums of exponentials, and sum of p x (zp - zq - c).

    c is the difference of the maxima of the first tile: it keeps the last sum small, and with it
    its rounding error.
    """
    row = tl.program_id(0).to(tl.int64) * VOCABULARY
    column = tl.arange(0, TILE)
    max_p, max_q, offset = float("-inf"), float("-inf"), 0.0
    sum_p = tl.zeros((TILE,), tl.float32)
    sum_q = tl.zeros((TILE,), tl.float32)
    sum_pd = tl.zeros((TILE,), tl.float32)
    for start in range(0, VOCABULARY, TILE):
        exists = start + column < VOCABULARY
        at = row + start + column
        zp = tl.load(p_ptr + at, mask=exists, other=float("-inf")).to(tl.float32)
        zq = tl.load(q_ptr + at, mask=exists, other=float("-inf")).to(tl.float32)
        new_p = tl.maximum(max_p, tl.max(zp, axis=0))
        new_q = tl.maximum(max_q, tl.max(zq, axis=0))
        p = tl.exp(zp - _finite_or_zero(new_p))
        q = tl.exp(zq - _finite_or_zero(new_q))
        if start == 0:
            offset = _finite_or_zero(new_p) - _finite_or_zero(new_q)
        scale_p = _rescaling(max_p, new_p)
        sum_p = sum_p * scale_p + p
        sum_q = sum_q * _rescaling(max_q, new_q) + q
        sum_pd = sum_pd * scale_p + tl.where(p == 0.0, 0.0, p * ((zp - zq) - offset))
        max_p, max_q = new_p, new_q
    total_p = tl.sum(sum_p, axis=0)
    ratio = tl.log(tl.div_rn(tl.sum(sum_q, axis=0), total_p))
    mean = tl.div_rn(tl.sum(sum_pd, axis=0), total_p)
    kl = mean + ratio + (offset - (max_p - max_q))
    tl.store(out_ptr + tl.program_id(0), tl.maximum(kl, 0.0, propagate_nan=tl.PropagateNan.ALL))
