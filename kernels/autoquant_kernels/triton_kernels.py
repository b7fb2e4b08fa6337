# mypy: ignore-errors
"""NVFP4, FP8 and token-KL kernels in Triton, for GPUs from sm_80 on and for Triton's interpreter.

Kernels that quantize load the two halves of their blocks of 16 as `[BLOCKS, 8]` tensors: a thread
then holds whole blocks, and maxima and sums need no exchange between threads. Division by a block
scale multiplies by its reciprocal and corrects the quotient with two fused multiply-adds, which is
exact for a correctly rounded reciprocal (Markstein 1990) as long as nothing over- or underflows;
outside that range of scales `DIVIDE` asks for the processor's own division. Kernels must be
compiled with `enable_fp_fusion=False`. Scales become tensors because the interpreter keeps numbers
as float64. With `MANY` a tensor is a row of equal matrices, and `g` or `scale` points to one scale
for each of them; sizes are then those of one matrix.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _magic(v, smallest: tl.constexpr, shift: tl.constexpr):
    """1.5 x 2^(exponent of v + shift): a sum with it keeps no bit below one step of the format."""
    k: tl.constexpr = (shift << 23) + 0x400000
    exponent = v.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(exponent + k, (smallest << 23) + k)


@triton.jit
def _round_e2m1(v):
    magic = _magic(v, 127, 22).to(tl.float32, bitcast=True)
    return (v + magic) - magic


@triton.jit
def _round_e4m3(t):
    magic = _magic(t, 121, 20).to(tl.float32, bitcast=True)
    return (t + magic) - magic


@triton.jit
def _with_sign_of(v, x):
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (v.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3_code(magnitude):
    normal = (magnitude.to(tl.int32, bitcast=True) >> 20) - 960
    subnormal = ((magnitude + 0.015625).to(tl.int32, bitcast=True) >> 20) - 968
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    return tl.where(magnitude != magnitude, 0x7F, code)


@triton.jit
def _e4m3_number(code):
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    subnormal = ((magnitude << 20) + 0x3C800000).to(tl.float32, bitcast=True) - 0.015625
    number = tl.where(magnitude < 8, subnormal, normal)
    number = tl.where(magnitude == 0x7F, float("nan"), number)
    return _with_sign_of(number, (code << 24).to(tl.float32, bitcast=True))


@triton.jit
def _quotient(x, safe, reciprocal, limit, DIVIDE: tl.constexpr):
    """RN(|x| / safe), at most limit / safe; NaN may become the latter."""
    x = tl.minimum(tl.abs(x), limit)
    if DIVIDE:
        return tl.div_rn(x, safe)
    guess = x * reciprocal
    return tl.fma(tl.fma(guess, -safe, x), reciprocal, guess)


@triton.jit
def _share(scale, units, UNITS: tl.constexpr, MANY: tl.constexpr):
    """This program's scale, its first unit, and how many exist from that on."""
    program = tl.program_id(0)
    if MANY:
        programs = tl.cdiv(units, UNITS)
        matrix = program // programs
        done = (program - matrix * programs).to(tl.int64) * UNITS
        first = matrix.to(tl.int64) * units + done
        scale = tl.load(scale + matrix)
    else:
        done = program.to(tl.int64) * UNITS
        first = done
    return scale, first, units - done


@triton.jit
def _reciprocal(scale, known, DIVIDE: tl.constexpr, MANY: tl.constexpr):
    """RN(1 / scale), which the host knows where there is one scale; unused with `DIVIDE`."""
    if MANY and not DIVIDE:
        known = libdevice.rcp_rn(scale)
    return known


@triton.jit
def _blocks(g, blocks, BLOCKS: tl.constexpr, MANY: tl.constexpr):
    """The scale `[1, 1]`, offsets `[BLOCKS, 1]` of this program's blocks, and which exist."""
    g, first, left = _share(g, blocks, BLOCKS, MANY)
    number = tl.arange(0, BLOCKS)[:, None]
    return tl.full((1, 1), g, tl.float32), first + number, number < left


@triton.jit
def _load(x_ptr, block, exists):
    first = x_ptr + block * 16 + tl.arange(0, 8)[None, :]
    low = tl.load(first, mask=exists)
    high = tl.load(first + 8, mask=exists)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _load_pairs(x_ptr, block, exists):
    """`_load` of bfloat16 from aligned words: half a word is a float32 but for its zeros."""
    first = x_ptr.to(tl.pointer_type(tl.int32)) + block * 8 + tl.arange(0, 4)[None, :]
    low, high = tl.load(first, mask=exists), tl.load(first + 4, mask=exists)
    return _both_halves(low), _both_halves(high)


@triton.jit
def _both_halves(words):
    even = (words << 16).to(tl.float32, bitcast=True)
    odd = (words & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(even, odd), (words.shape[0], 8))


@triton.jit
def _store(out_ptr, block, exists, low, high):
    first = out_ptr + block * 16 + tl.arange(0, 8)[None, :]
    tl.store(first, low.to(out_ptr.dtype.element_ty), mask=exists)
    tl.store(first + 8, high.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _halves(v, HALF: tl.constexpr):
    """Elements i and i + HALF of `[BLOCKS, 2 * HALF]`."""
    return tl.split(tl.permute(tl.reshape(v, (v.shape[0], 2, HALF)), (0, 2, 1)))


@triton.jit
def _larger_half(v, HALF: tl.constexpr):
    a, b = _halves(v, HALF)
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _half_sum(v, HALF: tl.constexpr):
    a, b = _halves(v, HALF)
    return a + b


@triton.jit
def _largest(low, high):
    pairs = tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL)
    return _larger_half(_larger_half(_larger_half(pairs, 4), 2), 1)


@triton.jit
def _divisor(scale, DIVIDE: tl.constexpr):
    """A block whose scale underflows to 0 holds zeros whatever it is divided by."""
    safe = tl.where(scale == 0.0, 1.0, scale)
    if DIVIDE:
        return safe, safe, safe * 6.0
    return safe, libdevice.rcp_rn(safe), safe * 6.0


@triton.jit
def _nearest(low, high, scale, DIVIDE: tl.constexpr):
    """The magnitudes of the elements after rounding to E2M1 numbers x `scale`."""
    safe, reciprocal, limit = _divisor(scale, DIVIDE)
    low_q = _round_e2m1(_quotient(low, safe, reciprocal, limit, DIVIDE))
    high_q = _round_e2m1(_quotient(high, safe, reciprocal, limit, DIVIDE))
    return low_q * scale, high_q * scale


@triton.jit
def _squared_error(low_y, high_y, low, high):
    """Squares added in the reference's order: i and i + 8 first, then 4, 2 and 1 apart."""
    low_d, high_d = low_y - tl.abs(low), high_y - tl.abs(high)
    return _half_sum(_half_sum(_half_sum(low_d * low_d + high_d * high_d, 4), 2), 1)


@triton.jit
def _sixths(amax, g, sixth, DIVIDE: tl.constexpr):
    """RN(amax / RN(6 g)), cut off where it rounds to 448; NaN stays NaN."""
    six = g * 6.0
    if DIVIDE:
        t = tl.div_rn(amax, six)
        return tl.minimum(t, 448.0, propagate_nan=tl.PropagateNan.ALL)
    amax = tl.minimum(amax, six * 448.0, propagate_nan=tl.PropagateNan.ALL)
    guess = amax * sixth
    return tl.fma(tl.fma(guess, -six, amax), sixth, guess)


@triton.jit
def _stored_scale(exact):
    """A block scale as checkpoints keep it; NaN stays NaN."""
    return _round_e4m3(tl.maximum(exact, 0.001953125, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _amax_scale(amax, g, sixth, DIVIDE: tl.constexpr):
    """The E4M3 number nearest to amax / 6g that checkpoints keep; 1 for a block of zeros."""
    exact = _sixths(amax, g, sixth, DIVIDE)
    return tl.where(exact == 0.0, 1.0, _stored_scale(exact))


@triton.jit
def _four_scale(amax, g, sixth, DIVIDE: tl.constexpr):
    exact = _sixths(amax, g, sixth, DIVIDE)
    four = _stored_scale(_sixths(amax * 1.5, g, sixth, DIVIDE))
    return tl.where(exact == 0.0, 1.0, four)


@triton.jit
def _signed(y, x):
    """y with its sign turned where x is negative."""
    turned = y.to(tl.int32, bitcast=True) ^ (x.to(tl.int32, bitcast=True) & -0x80000000)
    return turned.to(tl.float32, bitcast=True)


@triton.jit
def _moments(m_ptr, at, exists, ROW: tl.constexpr):
    """Row ROW of the moments of each block, its halves `[BLOCKS, 8]`."""
    first = m_ptr + at + ROW * 16 + tl.arange(0, 8)[None, :]
    return tl.load(first, mask=exists), tl.load(first + 8, mask=exists)


@triton.jit
def _diagonal_error(low, high, m_ptr, at, exists):
    low_m, high_m = _moments(m_ptr, at, exists, 0)
    terms = low * low * low_m + high * high * high_m
    return _half_sum(_half_sum(_half_sum(terms, 4), 2), 1)


@triton.jit
def _row_error(low, high, m_ptr, at, exists, d, ROW: tl.constexpr):
    """d of row ROW `[BLOCKS, 1]` times the sum of that row's moments times all."""
    low_m, high_m = _moments(m_ptr, at, exists, ROW)
    pairs = low_m * low + high_m * high
    return _half_sum(_half_sum(_half_sum(pairs, 4), 2), 1) * d


@triton.jit
def _pair_error(low, high, m_ptr, at, exists, low_d, high_d, ROW: tl.constexpr):
    first = _row_error(low, high, m_ptr, at, exists, low_d, ROW)
    return first + _row_error(low, high, m_ptr, at, exists, high_d, ROW + 8)


@triton.jit
def _hessian_error(low, high, m_ptr, at, exists):
    """Sum of d_i m_ij d_j in the reference's order, of errors `[BLOCKS, 8]`."""
    a0, a1, a2, a3, a4, a5, a6, a7 = _columns(low)
    b0, b1, b2, b3, b4, b5, b6, b7 = _columns(high)
    e0 = _pair_error(low, high, m_ptr, at, exists, a0, b0, 0)
    e1 = _pair_error(low, high, m_ptr, at, exists, a1, b1, 1)
    e2 = _pair_error(low, high, m_ptr, at, exists, a2, b2, 2)
    e3 = _pair_error(low, high, m_ptr, at, exists, a3, b3, 3)
    e0 += _pair_error(low, high, m_ptr, at, exists, a4, b4, 4)
    e1 += _pair_error(low, high, m_ptr, at, exists, a5, b5, 5)
    e2 += _pair_error(low, high, m_ptr, at, exists, a6, b6, 6)
    e3 += _pair_error(low, high, m_ptr, at, exists, a7, b7, 7)
    return (e0 + e2) + (e1 + e3)


@triton.jit
def _error(low_y, high_y, low, high, m_ptr, at, exists, RULE: tl.constexpr):
    """The error of a block by the rule, of magnitudes `[BLOCKS, 8]` in place of its elements."""
    low_d, high_d = low_y - tl.abs(low), high_y - tl.abs(high)
    if RULE == "diagonal":
        return _diagonal_error(low_d, high_d, m_ptr, at, exists)
    if RULE == "hessian":
        return _hessian_error(_signed(low_d, low), _signed(high_d, high), m_ptr, at, exists)
    return _squared_error(low_y, high_y, low, high)


@triton.jit
def _neighbour(scale, offset):
    """The E4M3 number `offset` codes from `scale`, within 1 and 126; NaN stays NaN."""
    code = tl.minimum(tl.maximum(_e4m3_code(scale) + offset, 1), 126)
    return tl.where(scale != scale, scale, _e4m3_number(code))


@triton.jit
def _best_in_window(
    low, high, amax, g, sixth, m_ptr, at, exists, RULE: tl.constexpr, DIVIDE: tl.constexpr
):
    """The E4M3 scale of least error from 3 codes below to 8 above that of `amax`."""
    start = _amax_scale(amax, g, sixth, DIVIDE)
    best = start
    least = tl.full(start.shape, float("inf"), tl.float32)
    for offset in range(-3, 9):
        candidate = _neighbour(start, offset)
        low_y, high_y = _nearest(low, high, candidate * g, DIVIDE)
        error = _error(low_y, high_y, low, high, m_ptr, at, exists, RULE)
        better = (error < least) | (offset == -3)
        best = tl.where(better, candidate, best)
        least = tl.where(better, error, least)
    fixed = (start != start) | (_sixths(amax, g, sixth, DIVIDE) == 0.0)
    return tl.where(fixed, start, best)


@triton.jit
def _four_or_six(low, high, g, sixth, DIVIDE: tl.constexpr):
    """The two scales `[BLOCKS, 1]`, what they round magnitudes to, and whether four is better."""
    amax = _largest(low, high)
    six = _amax_scale(amax, g, sixth, DIVIDE)
    four = _four_scale(amax, g, sixth, DIVIDE)
    low_six, high_six = _nearest(low, high, six * g, DIVIDE)
    low_four, high_four = _nearest(low, high, four * g, DIVIDE)
    error_six = _squared_error(low_six, high_six, low, high)
    error_four = _squared_error(low_four, high_four, low, high)
    better = error_four < error_six
    low_y = tl.where(better, low_four, low_six)
    return tl.where(better, four, six), low_y, tl.where(better, high_four, high_six)


@triton.jit
def _weight_scale(low, high, g, sixth, m_ptr, at, exists, RULE: tl.constexpr, DIVIDE: tl.constexpr):
    """E4M3 block scales `[BLOCKS, 1]` as float32, as checkpoints keep them; NaN stays NaN."""
    if RULE == "max":
        return _amax_scale(_largest(low, high), g, sixth, DIVIDE)
    if RULE == "four_over_six":
        scale, _, _ = _four_or_six(low, high, g, sixth, DIVIDE)
        return scale
    amax = _largest(low, high)
    return _best_in_window(low, high, amax, g, sixth, m_ptr, at, exists, RULE, DIVIDE)


@triton.jit
def _weight_magnitudes(
    low, high, g, sixth, m_ptr, at, exists, RULE: tl.constexpr, DIVIDE: tl.constexpr
):
    """What the exported form of a weight dequantizes to, without signs."""
    if RULE == "four_over_six":
        _, low_y, high_y = _four_or_six(low, high, g, sixth, DIVIDE)
        return low_y, high_y
    scale = _weight_scale(low, high, g, sixth, m_ptr, at, exists, RULE, DIVIDE)
    return _nearest(low, high, scale * g, DIVIDE)


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
def _columns(v):
    """The columns of `[BLOCKS, 8]`, `[BLOCKS, 1]` each."""
    left, right = _halves(v, 4)
    a, b = _halves(left, 2)
    c, d = _halves(right, 2)
    v0, v1 = _halves(a, 1)
    v2, v3 = _halves(b, 1)
    v4, v5 = _halves(c, 1)
    v6, v7 = _halves(d, 1)
    return v0, v1, v2, v3, v4, v5, v6, v7


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
def _column(v, COLUMN: tl.constexpr):
    """Column COLUMN of `[ROWS, 16]`, `[ROWS, 1]`, signs of zeros included."""
    own = tl.arange(0, 16)[None, :] == COLUMN
    bits = tl.where(own, v.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=1, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _carried(rest, upper_ptr, scale):
    """E2M1 numbers, what was rounded to them, errors and the sum of their squares, `[ROWS, 16]`.

    Column by column, each error over the diagonal carried into the columns behind it.
    """
    column = tl.arange(0, 16)[None, :]
    safe = tl.where(scale == 0.0, 1.0, scale)
    numbers, before = tl.zeros_like(rest), tl.zeros_like(rest)
    errors, total = tl.zeros_like(rest), tl.zeros_like(scale)
    for j in tl.static_range(16):
        v = _column(rest, j)
        quotient = tl.maximum(tl.div_rn(v, safe), -6.0, propagate_nan=tl.PropagateNan.ALL)
        q = _round_e2m1(tl.minimum(quotient, 6.0, propagate_nan=tl.PropagateNan.ALL))
        reciprocal = tl.div_rn(tl.full((1, 1), 1.0, tl.float32), tl.load(upper_ptr + j * 17))
        error = (v - q * scale) * reciprocal
        total = error * error if j == 0 else total + error * error
        numbers = tl.where(column == j, q, numbers)
        before = tl.where(column == j, v, before)
        errors = tl.where(column == j, error, errors)
        row = tl.load(upper_ptr + j * 16 + column)
        rest = tl.where(column > j, rest - error * row, rest)
    return numbers, before, errors, total


@triton.jit
def compensate_nvfp4(
    w_ptr,
    upper_ptr,
    words_ptr,
    scales_ptr,
    errors_ptr,
    rows,
    g,
    SEARCH: tl.constexpr,
    ROWS: tl.constexpr,
    MANY: tl.constexpr,
):
    """One block of each row with its errors carried from column to column."""
    program = tl.program_id(0)
    matrix = program // tl.cdiv(rows, ROWS)
    g, row, exists = _blocks(g, rows, ROWS, MANY)
    upper_ptr += matrix.to(tl.int64) * 256
    column = tl.arange(0, 16)[None, :]
    rest = tl.load(w_ptr + row * 16 + column, mask=exists, other=0.0)
    start = _e4m3_number(tl.load(scales_ptr + row, mask=exists, other=1).to(tl.int32))
    best = start
    if SEARCH:
        _, _, _, least = _carried(rest, upper_ptr, start * g)
        for offset in range(-3, 9):
            candidate = _neighbour(start, offset)
            _, _, _, total = _carried(rest, upper_ptr, candidate * g)
            better = total < least
            best = tl.where(better, candidate, best)
            least = tl.where(better, total, least)
    numbers, before, errors, _ = _carried(rest, upper_ptr, best * g)
    tl.store(errors_ptr + row * 16 + column, errors, mask=exists)
    tl.store(scales_ptr + row, _e4m3_code(best).to(tl.uint8), mask=exists)
    magnitude = tl.where(numbers != numbers, 0.0, tl.abs(numbers))
    code = tl.minimum(magnitude * 2.0, tl.minimum(magnitude + 2.0, magnitude * 0.5 + 4.0))
    sign = (before < 0.0) & (best == best)
    code = code.to(tl.int32) + tl.where(sign, 8, 0)
    words = tl.reshape(code, (ROWS, 2, 8)) << (4 * tl.arange(0, 8)[None, None, :])
    tl.store(words_ptr + row * 2 + tl.arange(0, 2)[None, :], tl.sum(words, axis=2), mask=exists)


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
