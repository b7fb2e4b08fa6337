"""Forms in which checkpoints store weights, read as the matrices [N, K] of single linears in BF16.

Wider numbers: a model that was saved in float32 or float16 computes in BF16 here and in engines.
Joined experts (Qwen3-VL-MoE, Qwen3.5-MoE): all experts of a layer in one 3-D tensor; serving
engines load their quantized form expert by expert.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from autoquant.errors import SourceError
from autoquant.source import names as table
from autoquant.source.headers import Headers, Inside, Scales, TensorHeader, data_bytes

WIDE = ("F16", "F32", "F64")
"""Dtypes that become BF16 where a model has most of its numbers in them."""

KEPT_WIDE = re.compile(r".*(A_log|dt_bias|correction_bias|inv_freq|\.D|_scale|_scales)")
"""Tensors whose extra bits engines use: of state spaces, routers and rotations."""

_DTYPE_KEYS = ("dtype", "torch_dtype")


def in_bf16(headers: Headers) -> Headers:
    """The headers with BF16 in place of wider numbers.

    A model that is mostly BF16 keeps the few tensors that it stores wider, but for linears.
    """
    sizes: dict[str, int] = {}
    for tensor in headers:
        if tensor.dtype in (*WIDE, "BF16"):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.elements
    is_wide = 2 * sizes.get("BF16", 0) < sum(sizes.values())
    tensors = {
        tensor.name: dataclasses.replace(tensor, dtype="BF16", stored_dtype=tensor.dtype)
        if tensor.dtype in WIDE
        and (is_wide or is_linear(tensor.name, tensor.shape))
        and not _is_kept(tensor)
        else tensor
        for tensor in headers
    }
    return dataclasses.replace(headers, tensors=tensors)


def _is_kept(tensor: TensorHeader) -> bool:
    return KEPT_WIDE.fullmatch(tensor.name) is not None


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is by its name and shape the matrix of a layer's linear, and no router."""
    module = name.removesuffix(".weight")
    if (
        len(shape) != 2
        or not table.LAYER.fullmatch(module)
        or table.INSIDE_ROUTER.fullmatch(module)
    ):
        return False
    return table.LINEAR.fullmatch(module.rpartition(".")[2]) is not None


def saying_bf16(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose dtype is that of `in_bf16`, as a whole and in every part that names one."""
    named = _with_bf16(config)
    return named if named.keys() & {*_DTYPE_KEYS} else named | {_DTYPE_KEYS[1]: "bfloat16"}


def _with_bf16(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: "bfloat16"
        if key in _DTYPE_KEYS
        else _with_bf16(value)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }


def apart(headers: Headers, config: Mapping[str, Any], hidden: object) -> Headers:
    """Every expert's matrices by the names that engines know, for architectures that join them.

    Args:
        headers: as stored.
        config: of the whole model.
        hidden: its hidden size, which tells [E, N, K] from [E, K, N]: publishers store the one,
            and transformers saves the other.
    """
    if config.get("model_type") not in table.MODELS_WITH_JOINED_EXPERTS:
        return headers
    tensors: dict[str, TensorHeader] = {}
    joined: dict[str, TensorHeader] = {}
    for tensor in headers:
        match = table.FUSED_EXPERTS.fullmatch(tensor.name)
        products = table.JOINED_EXPERTS.get(match["product"]) if match else None
        if match is None or products is None or len(tensor.shape) != 3:
            tensors[tensor.name] = tensor
            continue
        transposed = _is_transposed(tensor, match["container"], headers, hidden)
        if tensor.scales is not None and not _has_scales_apart(tensor):
            tensors[tensor.name] = tensor
            continue
        for part in _parts(tensor, match["container"], products, transposed=transposed):
            tensors[part.name] = part
            joined[part.name] = tensor
    return dataclasses.replace(headers, tensors=tensors, joined=joined)


def _is_transposed(tensor: TensorHeader, container: str, headers: Headers, hidden: object) -> bool:
    """Whether experts are stored [E, K, N]: the hidden size is K of gate and up, and N of down.

    A square matrix is stored like the other one of its layer, and not both can be square.
    """
    for product, axis in (("gate_up_proj", 2), ("down_proj", 1)):
        own = headers.tensors.get(f"{container}.{product}")
        if own is not None and len(own.shape) == 3 and own.shape[1] != own.shape[2]:
            is_asked = own.name == tensor.name
            if is_asked or tensor.shape[1] == tensor.shape[2]:
                return own.shape[axis] != hidden
    return False


def _parts(
    tensor: TensorHeader, container: str, products: tuple[str, ...], *, transposed: bool
) -> Iterator[TensorHeader]:
    """The matrices [N, K] of [E, P * N, K], or of [E, K, P * N], expert by expert."""
    experts, rows, columns = tensor.shape
    wide, inputs = (columns, rows) if transposed else (rows, columns)
    if wide % len(products):
        raise SourceError(
            f"{tensor.name} is {list(tensor.shape)}, which does not hold {' and '.join(products)}.",
            fix="check that config.json belongs to these weights.",
        )
    height = wide // len(products)
    size = data_bytes(tensor.stored_dtype or tensor.dtype, rows * columns)
    is_sliced = transposed or tensor.scales is not None
    for expert in range(experts):
        start = tensor.begin + expert * size
        for number, product in enumerate(products):
            share = 0 if is_sliced else number * size // len(products)
            yield dataclasses.replace(
                tensor,
                name=f"{container}.{expert}.{product}.weight",
                shape=(height, inputs),
                begin=start + share,
                end=start + (size if is_sliced else share + size // len(products)),
                inside=Inside((rows, columns), number * height, transposed) if is_sliced else None,
                scales=_scales_of(tensor.scales, expert),
            )


def _has_scales_apart(tensor: TensorHeader) -> bool:
    """Whether every expert of joined codes [E, ., .] has scales of its own, or all share one."""
    scales = tensor.scales
    assert scales is not None
    is_apart = scales.block[0] == 1 or scales.header.elements == 1
    return is_apart and not scales.transposed


def _scales_of(scales: Scales | None, expert: int) -> Scales | None:
    """Those of one expert of joined codes."""
    if scales is None or scales.header.elements == 1:
        return scales and dataclasses.replace(scales, block=scales.block[1:])
    header = scales.header
    size = (header.end - header.begin) // header.shape[0]
    begin = header.begin + expert * size
    own = dataclasses.replace(header, shape=header.shape[1:], begin=begin, end=begin + size)
    return dataclasses.replace(scales, header=own, block=scales.block[1:])
