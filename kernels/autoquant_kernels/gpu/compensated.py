# mypy: ignore-errors
"""Rows rounded column by column in Triton: a thread goes through the blocks of a row in turn.

A block is loaded as quarters `[ROWS, 4]`, each 16 bytes of one thread, and joined: a thread then
holds all 16 columns of a row, picks one of them in its registers, and exchanges nothing. Errors of
earlier blocks are read back from where they were written. `over` is one over the diagonal.
"""

import triton
import triton.language as tl

from autoquant_kernels.gpu.parts import (
    _blocks,
    _divisor,
    _e4m3_code,
    _halves,
    _neighbour,
    _reciprocal,
    _round_e2m1,
    _round_e4m3,
    _weight_scale,
)


@triton.jit
def _beside(a, b):
    """`[R, 2 C]` of two `[R, C]`."""
    pairs = tl.permute(tl.join(a, b), (0, 2, 1))
    return tl.reshape(pairs, (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _load_rows(first, exists):
    """16 float32 from each address `[ROWS, 1]` on, `[ROWS, 16]`."""
    at = first + tl.arange(0, 4)[None, :]
    a, b = tl.load(at, mask=exists), tl.load(at + 4, mask=exists)
    c, d = tl.load(at + 8, mask=exists), tl.load(at + 12, mask=exists)
    return _beside(_beside(a, b), _beside(c, d))


@triton.jit
def _store_rows(first, v, exists):
    at = first + tl.arange(0, 4)[None, :]
    low, high = _halves(v, 8)
    a, b = _halves(low, 4)
    c, d = _halves(high, 4)
    tl.store(at, a, mask=exists)
    tl.store(at + 4, b, mask=exists)
    tl.store(at + 8, c, mask=exists)
    tl.store(at + 12, d, mask=exists)


@triton.jit
def _column(v, column):
    """Column `column` of `[ROWS, 16]`, `[ROWS, 1]`, signs of zeros included."""
    own = tl.arange(0, 16)[None, :] == column
    bits = tl.where(own, v.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=1, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _shared_row(first):
    """16 float32 that all rows share, `[1, 16]`."""
    return _load_rows(first + tl.zeros((1, 1), tl.int32), None)


@triton.jit
def _carried_in(w_ptr, errors_ptr, upper_ptr, row, number, columns, exists):
    """What is left of block `number` of each row once all errors before it are carried in."""
    rest = _load_rows(w_ptr + row * columns + number * 16, exists)
    upper_ptr += number * 16
    errors_ptr += row * columns
    for column in range(number * 16):
        error = tl.load(errors_ptr + column, mask=exists, other=0.0)
        rest -= error * _shared_row(upper_ptr + column * columns)
    return rest


@triton.jit
def _nearest_number(v, scale, safe, reciprocal, FP8: tl.constexpr, DIVIDE: tl.constexpr):
    """The magnitude of the E2M1 number, or E4M3 with `FP8`, nearest to v, and what v loses by it.

    `safe` is the scale, or what to divide by instead, and `reciprocal` one over it. NaN stays NaN.
    """
    largest: tl.constexpr = 448.0 if FP8 else 6.0
    if DIVIDE:
        quotient = tl.div_rn(tl.abs(v), safe)
        quotient = tl.minimum(quotient, largest, propagate_nan=tl.PropagateNan.ALL)
    else:
        x = tl.minimum(tl.abs(v), safe * largest, propagate_nan=tl.PropagateNan.ALL)
        guess = x * reciprocal
        quotient = tl.fma(tl.fma(guess, -safe, x), reciprocal, guess)
    magnitude = _round_e4m3(quotient) if FP8 else _round_e2m1(quotient)
    y = magnitude * scale
    return magnitude, v - tl.where(v < 0.0, -y, y)


@triton.jit
def _carried(
    rest,
    upper_ptr,
    over_ptr,
    columns,
    scale,
    safe,
    reciprocal,
    FP8: tl.constexpr,
    DIVIDE: tl.constexpr,
):
    """What is left of each column when its turn comes, `[ROWS, 16]`, and the sum of squared errors.

    The error of each column, over the diagonal, is carried into the columns of the block behind it.
    """
    total = tl.zeros_like(scale)
    for j in range(16):  # unrolled it takes Triton many times as long to compile
        _, loss = _nearest_number(_column(rest, j), scale, safe, reciprocal, FP8, DIVIDE)
        error = loss * tl.load(over_ptr + j)
        total += error * error
        behind = tl.arange(0, 16)[None, :] > j
        rest = tl.where(behind, rest - error * _shared_row(upper_ptr + j * columns), rest)
    return rest, total


@triton.jit
def _carried_under_best(
    rest, upper_ptr, over_ptr, columns, e, g, SEARCH: tl.constexpr, DIVIDE: tl.constexpr
):
    """`_carried` under the E4M3 scale e, or with `SEARCH` one around it; and that scale.

    Turn -4 tries e itself, turns -3 to 8 the codes from 3 below to 8 above it, and turn 9 takes the
    one of least error: all in one loop, for a second `_carried` takes as long to compile again.
    """
    left, best, least = rest, e, tl.zeros_like(e)
    start: tl.constexpr = -4 if SEARCH else 9
    for turn in range(start, 10):
        tried = _neighbour(e, tl.where(turn == -4, 0, turn))
        candidate = tl.where(turn == 9, best, tried)
        scale = candidate * g
        safe, reciprocal, _ = _divisor(scale, DIVIDE)
        left, total = _carried(
            rest, upper_ptr, over_ptr, columns, scale, safe, reciprocal, FP8=False, DIVIDE=DIVIDE
        )
        better = (total < least) | (turn == -4)
        best = tl.where(better, candidate, best)
        least = tl.where(better, total, least)
    return left, best


@triton.jit
def _words(magnitude, is_negative):
    """E2M1 codes `[ROWS, 2]`, eight to a word, the first in the low nibble; NaN is code 0."""
    magnitude = tl.where(magnitude != magnitude, 0.0, magnitude)
    code = tl.minimum(magnitude * 2.0, tl.minimum(magnitude + 2.0, magnitude * 0.5 + 4.0))
    code = code.to(tl.int32) + tl.where(is_negative, 8, 0)
    nibbles = tl.reshape(code, (code.shape[0], 2, 8)) << (4 * tl.arange(0, 8)[None, None, :])
    return tl.sum(nibbles, axis=2)


@triton.jit
def compensate_nvfp4(
    w_ptr,
    upper_ptr,
    over_ptr,
    weights_ptr,
    words_ptr,
    scales_ptr,
    errors_ptr,
    rows,
    columns,
    g,
    sixth,
    RULE: tl.constexpr,
    DIVIDE: tl.constexpr,
    ROWS: tl.constexpr,
    MANY: tl.constexpr,
):
    """Two words of codes and an E4M3 scale to a block; errors over the diagonal.

    `weights_ptr` points to what errors of the columns of each matrix weigh under `diagonal`.
    """
    matrix = (tl.program_id(0) // tl.cdiv(rows, ROWS)).to(tl.int64)
    g, row, exists = _blocks(g, rows, ROWS, MANY)
    sixth = _reciprocal(g * 6.0, sixth, DIVIDE, MANY)
    upper_ptr += matrix * columns * columns
    over_ptr += matrix * columns
    blocks = columns // 16
    for number in range(blocks):
        first = number * 16
        rest = _carried_in(w_ptr, errors_ptr, upper_ptr, row, number, columns, exists)
        low, high = _halves(rest, 8)
        rule: tl.constexpr = "max" if RULE == "hessian" else RULE
        at, always = matrix * columns + first, tl.full((1, 1), True, tl.int1)
        e = _weight_scale(low, high, g, sixth, weights_ptr, at, always, rule, DIVIDE)
        own_upper, over = upper_ptr + first * columns + first, over_ptr + first
        search: tl.constexpr = RULE == "hessian"
        rest, e = _carried_under_best(rest, own_upper, over, columns, e, g, search, DIVIDE)
        scale = e * g
        safe, reciprocal, _ = _divisor(scale, DIVIDE)
        magnitude, loss = _nearest_number(rest, scale, safe, reciprocal, False, DIVIDE)
        _store_rows(errors_ptr + row * columns + first, loss * _shared_row(over), exists)
        block = row * blocks + number
        tl.store(scales_ptr + block, _e4m3_code(e).to(tl.uint8), mask=exists)
        words = _words(magnitude, (rest < 0.0) & (e == e))
        tl.store(words_ptr + block * 2 + tl.arange(0, 2)[None, :], words, mask=exists)
        tl.debug_barrier()  # before others of the program read errors


@triton.jit
def compensate_fp8(
    w_ptr,
    upper_ptr,
    over_ptr,
    codes_ptr,
    errors_ptr,
    rows,
    columns,
    scale,
    reciprocal,
    DIVIDE: tl.constexpr,
    ROWS: tl.constexpr,
    MANY: tl.constexpr,
):
    """FP8 codes, and errors over the diagonal."""
    matrix = (tl.program_id(0) // tl.cdiv(rows, ROWS)).to(tl.int64)
    scale, row, exists = _blocks(scale, rows, ROWS, MANY)
    reciprocal = _reciprocal(scale, reciprocal, DIVIDE, MANY)
    scale = tl.broadcast_to(scale, (ROWS, 1))
    upper_ptr += matrix * columns * columns
    over_ptr += matrix * columns
    for number in range(columns // 16):
        first = number * 16
        rest = _carried_in(w_ptr, errors_ptr, upper_ptr, row, number, columns, exists)
        own_upper, over = upper_ptr + first * columns + first, over_ptr + first
        rest, _ = _carried(
            rest, own_upper, over, columns, scale, scale, reciprocal, FP8=True, DIVIDE=DIVIDE
        )
        magnitude, loss = _nearest_number(rest, scale, scale, reciprocal, True, DIVIDE)
        at = row * columns + first
        _store_rows(errors_ptr + at, loss * _shared_row(over), exists)
        sign = (rest.to(tl.int32, bitcast=True) >> 24) & tl.where(rest != rest, 0, 0x80)
        codes = (_e4m3_code(magnitude) | sign).to(tl.uint8)
        tl.store(codes_ptr + at + tl.arange(0, 16)[None, :], codes, mask=exists)
        tl.debug_barrier()  # before others of the program read errors
