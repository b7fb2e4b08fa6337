"""Weights that a source stores as codes with scales, read as the BF16 weights that they stand for.

What a weight is follows from its tensors: their names, dtypes and shapes. Read are FP8 codes with
one scale for a tensor, a row or a block, and E2M1 codes with a power of two for 32 of them (MXFP4
of gpt-oss and DeepSeek-V4). All else that is quantized is refused by what was found.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from autoquant.errors import SourceError
from autoquant.source import names as table
from autoquant.source.declared import Declared, base_model
from autoquant.source.headers import Headers, Scales, TensorHeader

FP8 = ("F8_E4M3", "F8_E5M2")
HALF_BYTES = ("F4", "U8", "I8")
"""Dtypes of E2M1 codes, two a byte; only the first counts them one by one."""

WHOLE = ("U8", "I8", "U16", "I16", "U32", "I32")
NUMBERS = ("F32", "BF16", "F16")
EXPONENTS = ("F8_E8M0", "U8")
"""Dtypes of scales that are powers of two."""

MX_BLOCK = 32
"""Codes that share the scale of an MX format."""

USUAL_BLOCKS = (128, MX_BLOCK, 64, 256)
"""Rows or columns of codes that share a scale, tried in turn where no file says it."""

_WEIGHT, _PACKED, _BLOCKS = ".weight", ".weight_packed", "_blocks"
"""Endings of the names of codes; the first is also the weight's own."""

_SCALES = {
    _WEIGHT: (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight"),
    _PACKED: (".weight_scale",),
    _BLOCKS: ("_scales",),
    "": ("_scale_inv", "_scale"),
}
"""What takes the place of the codes' ending in the name of their scales."""

_WEIGHT_SCALES = ("weight_scale_inv", "weight_scale")
_GLOBAL_SCALES = ("weight_scale_2", "weight_global_scale")

_BESIDE_CODES = (
    *("input_scale", "input_scale_ub", "activation_scale", "qscale_act", "weight_shape"),
    *("k_scale", "v_scale", "q_scale", "output_scale"),
)
"""Last names of scalars that mean nothing to a weight without codes."""

_OTHER_CODES = {
    **dict.fromkeys(("qweight", "qzeros", "g_idx"), "integer codes of GPTQ or AWQ"),
    **dict.fromkeys(("absmax", "quant_map", "nested_absmax"), "codes of bitsandbytes"),
    "W_q": "codes of HQQ",
    "weight_zero_point": "integer codes with zero points",
}
"""Last names that give other quantizations away."""

_MOST_INTEGERS = 1 / 4
"""Share of the bytes of layers that tables of a router or of positions do not come near."""


@dataclass(frozen=True, slots=True)
class _Coded:
    """A weight as a file has it."""

    name: str
    """Of the weight that the codes stand for."""
    codes: TensorHeader
    scale: TensorHeader


def without_codes(headers: Headers, declared: Declared | None) -> Headers:
    """The headers with BF16 weights in place of codes; their scales are no tensors any more.

    Args:
        headers: as the files have them.
        declared: what the folder says of a quantization.

    Raises:
        SourceError: codes of a form that is not read, or that config.json does not declare; codes
            without scales or scales without codes; shapes that do not fit each other.
    """
    coded = {own.codes.name: own for tensor in headers if (own := _coded(tensor, headers))}
    scales = {own.scale.name for own in coded.values()}
    rest = [t for t in headers if t.name not in coded and t.name not in scales]
    for tensor in sorted(rest, key=lambda own: _last(own) in _WEIGHT_SCALES):  # codes say more
        _require_plain(tensor, headers, declared)
    _require_few_integers(rest, declared)
    weights = {name: _weight(own, declared) for name, own in coded.items()}
    tensors: dict[str, TensorHeader] = {}
    for tensor in headers:
        if tensor.name in weights:
            tensors[weights[tensor.name].name] = weights[tensor.name]
        elif tensor.name not in scales and not (coded and _is_beside_codes(tensor)):
            tensors[tensor.name] = tensor
    return dataclasses.replace(headers, tensors=tensors)


def _is_beside_codes(tensor: TensorHeader) -> bool:
    return _last(tensor) in _BESIDE_CODES and tensor.elements <= 2


def _last(tensor: TensorHeader) -> str:
    return tensor.name.rpartition(".")[2]


def _ending(name: str) -> str:
    return next(ending for ending in _SCALES if name.endswith(ending))


def _scale_of(name: str, tensors: Mapping[str, TensorHeader]) -> TensorHeader | None:
    """The tensor that is by its name the scale of codes."""
    ending = _ending(name)
    names = (name.removesuffix(ending) + scale for scale in _SCALES[ending])
    return next((tensors[own] for own in names if own in tensors), None)


def _coded(tensor: TensorHeader, headers: Headers) -> _Coded | None:
    """Codes and their scales of a form that is read, or None."""
    scale = _scale_of(tensor.name, headers.tensors)
    if scale is None:
        return None
    if tensor.dtype in FP8 and scale.dtype in (*NUMBERS, *EXPONENTS):
        return _Coded(tensor.name, tensor, scale)
    ending = _ending(tensor.name)
    if not ending or tensor.dtype not in HALF_BYTES or scale.dtype not in EXPONENTS:
        return None
    weight = "" if ending == _BLOCKS else _WEIGHT
    return _Coded(tensor.name.removesuffix(ending) + weight, tensor, scale)


def _weight(coded: _Coded, declared: Declared | None) -> TensorHeader:
    """The weight that codes stand for."""
    codes, scale = coded.codes, coded.scale
    if declared is None or not declared.is_read:
        _refuse(codes, declared, _as_stored(codes, scale), _PUBLISHED)
    shape, spelled, transposed = codes.shape, codes.dtype, False
    block: tuple[int, ...] | None
    if codes.name.endswith(_BLOCKS):  # [E, N, K / 32, 16] bytes of a parameter [E, K, N]
        shape = (*codes.shape[:-2], codes.shape[-2] * 2 * codes.shape[-1])
        transposed = True
    elif codes.dtype not in (*FP8, "F4"):
        shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if codes.dtype in FP8:
        block = _block(shape, scale, declared.block)
    else:
        spelled, block = "F4", (*(1 for _ in shape[:-1]), MX_BLOCK)
    if block is None or not _fits(shape, scale, block):
        _refuse_shapes(codes, scale, block)
    return dataclasses.replace(
        codes,
        name=coded.name,
        dtype="BF16",
        shape=(*shape[:-2], shape[-1], shape[-2]) if transposed else shape,
        stored_dtype=spelled,
        scales=Scales(
            scale,
            block,
            transposed,
            are_powers=scale.dtype in EXPONENTS or declared.scales_are_powers,
        ),
    )


def _block(
    shape: tuple[int, ...], scale: TensorHeader, declared: tuple[int, int] | None
) -> tuple[int, ...] | None:
    """Codes along each axis that share a scale; None where the scales' shape does not say."""
    if scale.elements == 1:
        return shape
    counts = (*scale.shape, *(1 for _ in shape[len(scale.shape) :]))  # [N]: one for each row
    if len(counts) != len(shape):
        return None
    sizes = [
        length if count == 1 else 1 if count == length else None
        for length, count in zip(shape, counts, strict=True)
    ]
    if None in sizes and declared is not None:
        sizes[-2:] = declared
    usual = [
        size or next((own for own in USUAL_BLOCKS if -(-length // own) == count), None)
        for size, length, count in zip(sizes, shape, counts, strict=True)
    ]
    return None if None in usual else tuple(size for size in usual if size is not None)


def _fits(shape: tuple[int, ...], scale: TensorHeader, block: tuple[int, ...]) -> bool:
    """Whether there is one scale for each block, trailing axes of one scale left out or not."""
    counts = [-(-n // size) for n, size in zip(shape, block, strict=True)]
    given = [*scale.shape, *(1 for _ in counts[len(scale.shape) :])]
    return given == counts or scale.elements == 1 == max(counts, default=1)


def _require_plain(tensor: TensorHeader, headers: Headers, declared: Declared | None) -> None:
    """Raise if the tensor is part of a quantization that is not read, or that is not whole."""
    last, scale = _last(tensor), _scale_of(tensor.name, headers.tensors)
    if last in _GLOBAL_SCALES or _is_nvfp4(tensor if scale is None else scale):
        _refuse(tensor, declared, _as_stored(tensor, scale) + ", which is NVFP4", _SERVE_IT)
    if last in _OTHER_CODES:
        _refuse(tensor, declared, f"one of the {_OTHER_CODES[last]}", _UNQUANTIZED)
    is_codes = last in ("weight", "weight_packed")
    if tensor.dtype in FP8 and scale is None and len(tensor.shape) > 1:
        if declared is not None and declared.block is not None:
            raise SourceError(
                f"{tensor.file} holds {tensor.name}, in {tensor.dtype.removeprefix('F8_')} without "
                f"{tensor.name}_scale_inv.",
                fix="download the model again.",
            )
        _refuse(tensor, declared, _as_stored(tensor, None) + " without scales", _UNQUANTIZED)
    if tensor.dtype == "F4" or (is_codes and tensor.dtype in (*WHOLE, *FP8)):
        _refuse(tensor, declared, _as_stored(tensor, scale), _UNQUANTIZED)
    if last in _WEIGHT_SCALES:
        if declared is not None and declared.is_read:
            raise SourceError(
                f"{tensor.file} holds {tensor.name}, and no E4M3 weight belongs to it.",
                fix="download the model again.",
            )
        raise SourceError(
            f"{tensor.file.parent} stores block scales, and its config.json declares no "
            f"quant_method fp8: {tensor.name} is {_as_stored(tensor, None)}, beside no codes.",
            fix="download config.json again, or pass the BF16 version of the model.",
        )


def _require_few_integers(tensors: Sequence[TensorHeader], declared: Declared | None) -> None:
    """Raise if layers consist of integers, whatever these are called."""
    in_layers = [tensor for tensor in tensors if table.LAYER.fullmatch(tensor.name)]
    integers = [t for t in in_layers if t.dtype in WHOLE and len(t.shape) > 1]
    total = sum(tensor.end - tensor.begin for tensor in in_layers)
    if integers and sum(t.end - t.begin for t in integers) > _MOST_INTEGERS * total:
        first = integers[0]
        what = f"{_as_stored(first, None)}, like a large part of its layers"
        _refuse(first, declared, what, _UNQUANTIZED)


_SERVE_IT = "serve it as it is; to choose formats anew, pass {base}."
_UNQUANTIZED = "pass {base}."
_PUBLISHED = "pass {base}; if it was published like this, download its own config.json again."


def _is_nvfp4(scale: TensorHeader) -> bool:
    """Whether these are the block scales of NVFP4: E4M3, where other formats have none."""
    return scale.dtype == "F8_E4M3" and _last(scale) == "weight_scale"


def _as_stored(tensor: TensorHeader, scale: TensorHeader | None) -> str:
    beside = f" beside {scale.name}, {scale.dtype} {list(scale.shape)}" if scale is not None else ""
    return f"{tensor.dtype} {list(tensor.shape)}{beside}"


def _refuse(tensor: TensorHeader, declared: Declared | None, what: str, fix: str) -> NoReturn:
    folder = tensor.file.parent
    said = declared or "no file of it says how"
    named = base_model(folder)
    base = "the unquantized model that it was made from" + (f", {named}" if named else "")
    raise SourceError(
        f"{folder} is already quantized ({said}): {tensor.name} is {what}.",
        fix=fix.format(base=base),
    )


def _refuse_shapes(
    codes: TensorHeader, scale: TensorHeader, block: tuple[int, ...] | None
) -> NoReturn:
    found = f"{scale.name} is {scale.dtype} {list(scale.shape)}"
    if block is None:
        why = f"{list(codes.shape)} codes cannot be shared out among so many scales"
    else:
        counts = [-(-n // size) for n, size in zip(codes.shape, block, strict=False)]
        sizes = " x ".join(map(str, block))
        why = f"blocks of {sizes} give {list(codes.shape)} codes scales {counts}"
    raise SourceError(f"{found}; {why}.", fix="check that config.json belongs to these weights.")
