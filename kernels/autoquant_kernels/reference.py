"""NVFP4 and FP8 in plain PyTorch: the oracle that every other backend matches bit for bit.

All arithmetic is IEEE float32, each operation rounded once to nearest even (RN). Rounding to E2M1
or E4M3 adds and subtracts 1.5 * 2^k, with k chosen so that one unit in the last place of the sum is
one step of the target format. Tensors are worked on in chunks that stay in the CPU's cache.

Every function takes contiguous tensors, scales that are already positive finite float32 values (one
for the whole tensor, or one for each of as many equal parts), and the tensors that it writes.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 16
CHUNK_BLOCKS = 1 << 14
KL_CHUNK_ELEMENTS = 1 << 20

CODES_BELOW = 3
CODES_ABOVE = 8
"""Rules of least error try the E4M3 codes from 3 below to 8 above that of the largest magnitude.

Against a sweep of all 126 codes this loses nothing of the squared error on normal, uniform,
Laplace, Student-t and log-normal blocks (`tests/kernels/test_scale_rules.py`), and 0.14 % of errors
weighted by the inputs of two real language models.
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


def fake_quant_nvfp4_weight(
    x: Tensor, scales: Sequence[float], rule: str, moments: Tensor | None, out: Tensor
) -> None:
    """Write what `dequantize_nvfp4(quantize_nvfp4(x))` gives, without storing the codes."""
    views = x.view(-1, BLOCK), out.view(-1, BLOCK)
    rows = _rows_at_once(rule)
    chunks = _scaled_chunks(scales, rows, *views)
    for (g, source, target), own in zip(
        chunks, _moment_chunks(moments, scales, rows, len(views[0])), strict=True
    ):
        blocks = source.float() + 0.0
        scale = _block_scales(blocks, g, rule, own) * g
        target.copy_(torch.copysign(_nearest(blocks, scale), blocks))


def quantize_nvfp4(
    x: Tensor,
    scales: Sequence[float],
    rule: str,
    moments: Tensor | None,
    codes: Tensor,
    block_scale: Tensor,
) -> None:
    """Write the packed E2M1 codes (even column in the low nibble) and the E4M3 block scales."""
    views = x.view(-1, BLOCK), codes.view(-1, BLOCK // 2), block_scale.view(-1, 1)
    rows = _rows_at_once(rule)
    chunks = _scaled_chunks(scales, rows, *views)
    for (g, source, packed, stored), own in zip(
        chunks, _moment_chunks(moments, scales, rows, len(views[0])), strict=True
    ):
        blocks = source.float()
        scale = _block_scales(blocks, g, rule, own)
        q = round_e2m1(blocks / _divisor(scale * g))
        packed.copy_(_packed(q, (blocks < 0) & ~scale.isnan()))
        stored.copy_(scale.to(torch.float8_e4m3fn))


def compensate_nvfp4(
    w: Tensor,
    upper: Tensor,
    scales: Sequence[float],
    rule: str,
    codes: Tensor,
    block_scale: Tensor,
    errors: Tensor,
) -> None:
    """Round each row column by column, each error carried into all columns after it.

    Of `w` `[P * N, C]` every N rows have one of the P `scales` and of `upper` `[P, C, C]`. The
    scale of a block is chosen from what is left of it when its turn comes.
    """
    packed, stored = codes.view(len(w), -1, BLOCK // 2), block_scale.view(len(w), -1, 1)
    chunks = _compensated_chunks(scales, upper, w, packed, stored, errors)
    for g, factor, rest, packs, stores, losses in chunks:
        for number, own in enumerate(_column_blocks(factor)):
            tried = _compensated_scales(rest[:, own], factor[own, own], g, rule)
            q, before, error = _carried(
                rest[:, own].expand(len(tried), -1, -1), factor[own, own], tried * g, round_e2m1
            )
            best = _first_least(error)
            scale = _taken(tried, best)
            sign = (_taken(before, best) < 0) & ~scale.isnan()
            packs[:, number] = _packed(_taken(q, best), sign)
            stores[:, number] = scale.to(torch.float8_e4m3fn)
            losses[:, own] = _taken(error, best)
            _carry_on(rest, factor, losses, own)


def _compensated_chunks(
    scales: Sequence[float], upper: Tensor, w: Tensor, *written: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of rows of one matrix: its scale and factor, a copy of what is rounded, the rest."""
    size, at = len(w) // len(scales), 0
    for scale, rows, *own in _scaled_chunks(scales, _rows_of(w.shape[1]), w, *written):
        yield scale, upper[at // size], rows.clone(), *own
        at += len(rows)


def _rows_of(columns: int) -> int:
    return max(1, CHUNK_BLOCKS * BLOCK // columns)


def _column_blocks(factor: Tensor) -> Iterator[slice]:
    for start in range(0, len(factor), BLOCK):
        yield slice(start, start + BLOCK)


def _compensated_scales(blocks: Tensor, upper: Tensor, g: Tensor, rule: str) -> Tensor:
    """The E4M3 scales `[C, N, 1]` of blocks `[N, 16]` of which that of least error is taken."""
    if rule == "hessian":
        start = _block_scales(blocks, g, "max", None)
        return torch.stack([start, *_window(start)])
    weights = upper.diagonal().square().reciprocal()[None] if rule == "diagonal" else None
    return _block_scales(blocks, g, rule, weights)[None]


def _carry_on(rest: Tensor, upper: Tensor, errors: Tensor, own: slice) -> None:
    """Carry the errors of a block's columns into the columns behind it, one after the other."""
    for column in range(own.start, own.stop):
        rest[:, own.stop :] -= errors[:, column : column + 1] * upper[column, own.stop :]


def _carried(
    w: Tensor, upper: Tensor, scale: Tensor, rounded: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, what was rounded to them, and errors, of blocks `[C, N, 16]`, and all of that shape.

    Args:
        w: what is left of the blocks.
        upper: of their columns, `[16, 16]`.
        scale: `[C, N, 1]`, or one.
        rounded: to the numbers that codes stand for.
    """
    before = w.clone()
    q, errors = torch.empty_like(before), torch.empty_like(before)
    for column in range(BLOCK):
        v = before[..., column : column + 1]
        nearest = rounded(v / _divisor(scale))
        error = (v - nearest * scale) * (1 / upper[column, column])
        q[..., column : column + 1], errors[..., column : column + 1] = nearest, error
        before[..., column + 1 :] -= error * upper[column, column + 1 :]
    return q, before, errors


def _first_least(errors: Tensor) -> Tensor:
    """The first of C candidates of least sum of squares, added column by column, of each row."""
    total = errors[..., 0].square()
    for column in range(1, BLOCK):
        total += errors[..., column].square()
    best = torch.zeros_like(total[0], dtype=torch.int64)
    least = total[0]
    for number, own in enumerate(total[1:], start=1):
        better = own < least
        best, least = torch.where(better, number, best), torch.where(better, own, least)
    return best


def _taken(candidates: Tensor, number: Tensor) -> Tensor:
    """Of `[C, N, ...]` the candidate of each row."""
    return candidates[number, torch.arange(len(number), device=number.device)]


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
        target.copy_(_e4m3_codes(round_e4m3(values / s), values))


def _e4m3_codes(q: Tensor, before: Tensor) -> Tensor:
    """float8_e4m3fn of E4M3 numbers with the signs of what was rounded to them; NaN is 0x7F."""
    signed = torch.copysign(q, before)
    return signed.masked_fill_(before.isnan(), torch.nan).to(torch.float8_e4m3fn)


def compensate_fp8(
    w: Tensor, upper: Tensor, scales: Sequence[float], codes: Tensor, errors: Tensor
) -> None:
    """Round each row column by column, each error carried into all columns after it.

    Of `w` `[P * N, C]` every N rows have one of the P `scales` and of `upper` `[P, C, C]`.
    """
    chunks = _compensated_chunks(scales, upper, w, codes, errors)
    for scale, factor, rest, stores, losses in chunks:
        for own in _column_blocks(factor):
            q, before, losses[:, own] = _carried(rest[:, own], factor[own, own], scale, round_e4m3)
            stores[:, own] = _e4m3_codes(q, before)
            _carry_on(rest, factor, losses, own)


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


def _packed(q: Tensor, sign: Tensor) -> Tensor:
    """Two codes a byte of E2M1 numbers and signs `[blocks, 16]`; NaN is code 0."""
    values = torch.tensor(E2M1_VALUES, device=q.device)
    magnitude = torch.searchsorted(values, q.abs().nan_to_num_(0.0), out_int32=True)
    code = (magnitude + (sign << 3)).to(torch.uint8)
    return code[:, 0::2] | (code[:, 1::2] << 4)


def _block_scales(blocks: Tensor, g: Tensor, rule: str, moments: Tensor | None) -> Tensor:
    """E4M3 block scales `[blocks, 1]` as float32; NaN for a block that holds a NaN."""
    amax = _largest(blocks)
    exact = amax / (g * 6)
    scale = _stored_scale(exact)
    if rule == "four_over_six":
        best = _four_or_six(blocks, scale, _stored_scale(amax * 1.5 / (g * 6)), g)
    elif rule == "max":
        best = scale
    else:
        best = _best_in_window(blocks, scale, g, moments)
    return torch.where(exact == 0, 1.0, best)


def _stored_scale(exact: Tensor) -> Tensor:
    return round_e4m3(exact.clamp(SMALLEST_E4M3, LARGEST_E4M3))


def _four_or_six(blocks: Tensor, six: Tensor, four: Tensor, g: Tensor) -> Tensor:
    four_is_better = _error(blocks, four * g) < _error(blocks, six * g)
    return torch.where(four_is_better, four, six)


def _best_in_window(blocks: Tensor, scale: Tensor, g: Tensor, moments: Tensor | None) -> Tensor:
    best, least = scale, torch.empty_like(scale)
    for number, candidate in enumerate(_window(scale)):
        error = _error(blocks, candidate * g, moments)
        better = (error < least) | (number == 0)
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return torch.where(scale.isnan(), scale, best)


def _window(scale: Tensor) -> Iterator[Tensor]:
    """The E4M3 numbers that rules of least error try, the smallest first."""
    code = scale.to(torch.float8_e4m3fn).view(torch.uint8).short()
    for offset in range(-CODES_BELOW, CODES_ABOVE + 1):
        tried = (code + offset).clamp_(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).float()
        yield torch.where(scale.isnan(), scale, tried)


def _error(blocks: Tensor, scale: Tensor, moments: Tensor | None = None) -> Tensor:
    """Sum of squares of d = RN(dequantized - w); with moments sum of d_i^2 m_i, or of d_i m_ij d_j.

    Every sum is added in a fixed order: i + (i + 8), then 4, 2, 1 apart.
    """
    d = _nearest(blocks, scale) - blocks
    if moments is None:
        return _sum(d.square())
    if moments.ndim == 2:
        return _sum(d.square() * moments)
    return _sum(_sum(moments * d[:, None, :])[..., 0] * d)


def _sum(terms: Tensor) -> Tensor:
    for half in (8, 4, 2, 1):
        terms = terms[..., :half] + terms[..., half:]
    return terms


def _rows_at_once(rule: str) -> int:
    """Blocks of a chunk: 16 x 16 numbers belong to each under `hessian`."""
    return CHUNK_BLOCKS // BLOCK if rule == "hessian" else CHUNK_BLOCKS


def _moment_chunks(
    moments: Tensor | None, scales: Sequence[float], rows: int, blocks: int
) -> Iterator[Tensor | None]:
    """The moments of every block of each chunk of `_scaled_chunks`."""
    size = blocks // len(scales)
    for part in range(len(scales)):
        for start in range(0, size, rows):
            if moments is None:
                yield None
                continue
            own = moments[part % len(moments)]
            number = torch.arange(start, min(start + rows, size), device=own.device)
            yield own[number % len(own)]
