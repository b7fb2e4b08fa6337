# mypy: ignore-errors
"""What the Triton kernels are made of: roundings, quotients, blocks of 16 and their scales.

Division by a block scale multiplies by its reciprocal and corrects the quotient with two fused
multiply-adds, which is exact for a correctly rounded reciprocal (Markstein 1990) as long as nothing
over- or underflows; outside that range of scales `DIVIDE` asks for the processor's own division.
The names keep their underscores: kernels have arguments that are called the same without.
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
