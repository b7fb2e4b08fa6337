"""Forms in which checkpoints store weights, read as the matrices [N, K] of single linears.

Block FP8 (DeepSeek, MiniMax): E4M3 codes with one float32 scale for each block of 128 x 128.
Joined experts (Qwen3-VL-MoE, Qwen3.5-MoE): all experts of a layer in one 3-D tensor; serving
engines load their quantized form expert by expert.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from autoquant.errors import SourceError
from autoquant.source import names as table
from autoquant.source.headers import (
    DTYPE_BYTES,
    BlockScale,
    Columns,
    Headers,
    TensorHeader,
)

BLOCK_SCALE = "_scale_inv"
"""Suffix of the name of a block-FP8 weight's scales."""

QUANTIZATION = "quantization_config"


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, or None if the config does not declare block FP8."""
    method = config.get(QUANTIZATION)
    if not isinstance(method, dict) or method.get("quant_method") != "fp8":
        return None
    match method.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


def dequantized(headers: Headers, block: tuple[int, int]) -> Headers:
    """The weights that block-FP8 codes stand for, in BF16; their scales are no tensors any more.

    Raises:
        SourceError: codes without scales, scales without codes, or shapes that do not fit.
    """
    tensors: dict[str, TensorHeader] = {}
    for tensor in headers:
        codes = headers.tensors.get(tensor.name.removesuffix(BLOCK_SCALE))
        if tensor.name.endswith(BLOCK_SCALE):
            if codes is None or codes.dtype != "F8_E4M3":
                raise _unpaired(tensor, "and no E4M3 weight belongs to it")
        elif tensor.dtype != "F8_E4M3":
            tensors[tensor.name] = tensor
        else:
            scale = headers.tensors.get(tensor.name + BLOCK_SCALE)
            if scale is None:
                raise _unpaired(tensor, f"in E4M3 without {tensor.name}{BLOCK_SCALE}")
            _require_fit(tensor, scale, block)
            tensors[tensor.name] = dataclasses.replace(
                tensor, dtype="BF16", block_scale=BlockScale(scale, block)
            )
    return dataclasses.replace(headers, tensors=tensors)


def _require_fit(codes: TensorHeader, scale: TensorHeader, block: tuple[int, int]) -> None:
    expected = tuple(-(-n // size) for n, size in zip(codes.shape, block, strict=False))
    if len(codes.shape) != 2 or scale.shape != expected or scale.dtype not in ("F32", "BF16"):
        raise SourceError(
            f"{scale.name} is {scale.dtype} {list(scale.shape)}; blocks of {block[0]} x {block[1]} "
            f"give {list(codes.shape)} codes float32 scales {list(expected)}.",
            fix="check that config.json belongs to these weights.",
        )


def _unpaired(tensor: TensorHeader, how: str) -> SourceError:
    return SourceError(
        f"{tensor.file} holds {tensor.name}, {how}.", fix="download the model again."
    )


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
        axis_of_hidden = 1 if products == table.JOINED_EXPERTS["down_proj"] else 2
        transposed = tensor.shape[axis_of_hidden] != hidden
        for part in _parts(tensor, match["container"], products, transposed=transposed):
            tensors[part.name] = part
            joined[part.name] = tensor
    return dataclasses.replace(headers, tensors=tensors, joined=joined)


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
    size = rows * columns * DTYPE_BYTES[tensor.dtype]
    for expert in range(experts):
        start = tensor.begin + expert * size
        for number, product in enumerate(products):
            share = 0 if transposed else number * size // len(products)
            yield dataclasses.replace(
                tensor,
                name=f"{container}.{expert}.{product}.weight",
                shape=(height, inputs),
                begin=start + share,
                end=start + (size if transposed else share + size // len(products)),
                columns=Columns((rows, columns), number * height) if transposed else None,
            )
