"""An exported checkpoint, read back as the source tensors that it stands for."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import autoquant_kernels as kernels
import torch
from torch import Tensor

from autoquant.checkpoint.headers import Headers, TensorHeader
from autoquant.checkpoint.json_file import read_json_object
from autoquant.checkpoint.layout_modelopt import (
    GLOBAL_SCALE,
    INPUT_SCALE,
    WEIGHT_SCALE,
    stored_tensors,
)
from autoquant.checkpoint.shards import inside, read_checkpoint_headers
from autoquant.checkpoint.source import CONFIG_FILE, text_config
from autoquant.checkpoint.tensors import read_tensor
from autoquant.errors import SourceError
from autoquant.formats import Format
from autoquant.grouping import Groups, group_tensors
from autoquant.groups import Linear

_WEIGHT = ".weight"
_SCALES = (WEIGHT_SCALE, GLOBAL_SCALE, INPUT_SCALE)


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint:
    """A checkpoint in the ModelOpt layout whose tensors have the right names and shapes."""

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    headers: Headers = field(repr=False)
    """What is stored."""
    formats: Mapping[str, Format] = field(repr=False)
    """Format of every quantized linear, by its name on disk."""

    @cached_property
    def source_headers(self) -> Headers:
        """The tensors that the checkpoint stands for; byte ranges are those of the codes."""
        tensors = {
            header.name: self._as_source(header)
            for header in self.headers
            if not self._is_scale(header.name)
        }
        return Headers(tensors=tensors, metadata=self.headers.metadata)

    @cached_property
    def groups(self) -> Groups:
        """Layer groups, each shared expert apart from the routed ones."""
        return group_tensors(
            self.source_headers.tensors,
            self.config,
            text_config(self.config),
            shared_experts="separate",
        )

    @cached_property
    def input_scales(self) -> dict[str, float]:
        """`input_scale` of every quantized linear: the largest input over 6 * 448, or over 448."""
        return {name: self.scalar(name + INPUT_SCALE).item() for name in self.formats}

    def scalar(self, name: str) -> Tensor:
        """A 0-dimensional float32 scale."""
        return read_tensor(self.headers[name])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every source tensor by name: dequantized to BF16 if quantized, else as stored."""
        for header in self.source_headers:
            name = header.name.removesuffix(_WEIGHT)
            stored = read_tensor(self.headers[header.name])
            yield header.name, self._dequantize(name, stored) if name in self.formats else stored

    def _dequantize(self, name: str, codes: Tensor) -> Tensor:
        scale = read_tensor(self.headers[name + WEIGHT_SCALE])
        if self.formats[name] is Format.FP8:
            return kernels.dequantize_fp8(codes, scale, dtype=torch.bfloat16)
        global_scale = self.scalar(name + GLOBAL_SCALE)
        return kernels.dequantize_nvfp4(codes, scale, global_scale, dtype=torch.bfloat16)

    def _is_scale(self, name: str) -> bool:
        return any(name.endswith(end) and name.removesuffix(end) in self.formats for end in _SCALES)

    def _as_source(self, header: TensorHeader) -> TensorHeader:
        name = header.name.removesuffix(_WEIGHT)
        if name not in self.formats:
            return header
        rows, columns = header.shape
        packed = 2 if self.formats[name] is Format.NVFP4 else 1
        return dataclasses.replace(header, dtype="BF16", shape=(rows, columns * packed))


def open_quantized(folder: str | Path) -> QuantizedCheckpoint:
    """Open a folder that `export` has written.

    Raises:
        SourceError: missing, damaged, in another layout, or with a quantized linear that lacks a
            scale or has one of the wrong shape.
    """
    path = Path(folder)
    if not path.is_dir():
        raise SourceError(f"the folder {path} does not exist.", fix="check the path.")
    if not (path / CONFIG_FILE).exists():
        raise SourceError(
            f"{path} holds no {CONFIG_FILE}.", fix="pass the folder that export has written."
        )
    config = read_json_object(inside(path, CONFIG_FILE))
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is not None and method != "modelopt":
        raise SourceError(
            f"{path} is quantized by {method!r}; only the layout `modelopt` is read.",
            fix="pass a checkpoint that `autoquant export` has written.",
        )
    headers = read_checkpoint_headers(path)
    return QuantizedCheckpoint(path=path, config=config, headers=headers, formats=_formats(headers))


def _formats(headers: Headers) -> dict[str, Format]:
    """Formats by what is stored.

    Raises:
        SourceError: a quantized linear is not stored as its format says, or a scale has no linear.
    """
    formats: dict[str, Format] = {}
    for header in headers:
        name = header.name.removesuffix(_WEIGHT)
        if name != header.name and f"{name}{WEIGHT_SCALE}" in headers:
            formats[name] = Format.NVFP4 if header.dtype == "U8" else Format.FP8
            _require_stored(headers, name, formats[name])
    for header in headers:
        end = next((end for end in _SCALES if header.name.endswith(end)), None)
        if end is not None and header.name.removesuffix(end) not in formats:
            raise SourceError(
                f"{header.file} holds {header.name}, and no quantized weight belongs to it.",
                fix="export the checkpoint again.",
            )
        coded = header.dtype in ("U8", "F8_E4M3") and header.name.endswith(_WEIGHT)
        if coded and header.name.removesuffix(_WEIGHT) not in formats:
            raise SourceError(
                f"{header.file} holds {header.name} in {header.dtype} without {WEIGHT_SCALE}.",
                fix="export the checkpoint again.",
            )
    return formats


def _require_stored(headers: Headers, name: str, format: Format) -> None:
    weight = headers[name + _WEIGHT]
    if len(weight.shape) != 2:
        raise SourceError(
            f"{weight.name} has shape {list(weight.shape)}; a quantized weight has two axes.",
            fix="export the checkpoint again.",
        )
    packed = 2 if format is Format.NVFP4 else 1
    linear = Linear(
        name=name,
        out_features=weight.shape[0],
        in_features=weight.shape[1] * packed,
        weight_scale_set=name,
        input_scale_set=name,
    )
    for expected in stored_tensors(linear, format):
        found = headers.tensors.get(expected.name)
        if found is None:
            raise SourceError(
                f"{weight.file.parent} stores {name} in {format.upper()} without {expected.name}.",
                fix="export the checkpoint again.",
            )
        if (found.dtype, found.shape) != (expected.dtype, expected.shape):
            raise SourceError(
                f"{found.name} is {found.dtype} {list(found.shape)}; {format.upper()} stores "
                f"{expected.dtype} {list(expected.shape)}.",
                fix="export the checkpoint again.",
            )
