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

from autoquant.errors import SourceError
from autoquant.export.export import AUTOQUANT_FILE
from autoquant.export.kv_scales import attention_of, kv_scale_tensors
from autoquant.export.layouts.base import (
    Layout,
    StoredTensor,
    TensorNames,
    stored_tensors,
    tensor_names,
)
from autoquant.export.layouts.compressed_tensors import scale_of
from autoquant.formats import Format
from autoquant.plan.grouping import Groups, group_tensors
from autoquant.plan.linears import Linear
from autoquant.source import stored_forms
from autoquant.source.headers import Headers, TensorHeader
from autoquant.source.json_file import read_json_object
from autoquant.source.shards import inside, read_checkpoint_headers
from autoquant.source.source import CONFIG_FILE, text_config
from autoquant.source.tensors import read_tensor

_WEIGHT = ".weight"
_QUANTIZED = (Format.NVFP4, Format.FP8)


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint:
    """A checkpoint whose tensors have the names and shapes of its layout."""

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    headers: Headers = field(repr=False)
    """What is stored."""
    layout: Layout
    formats: Mapping[str, Format] = field(repr=False)
    """Format of every quantized linear, by its name on disk."""
    attention: tuple[str, ...] = field(repr=False)
    """Modules with scales for their keys and values; none where the cache stays in BF16."""

    @cached_property
    def source_headers(self) -> Headers:
        """The tensors that the checkpoint stands for; byte ranges are those of the codes."""
        scales = self._scales
        tensors = (self._as_source(h) for h in self.headers if h.name not in scales)
        return Headers(tensors={h.name: h for h in tensors}, metadata=self.headers.metadata)

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
        """Input scale of every quantized linear: the largest input over 6 * 448, or over 448."""
        return {
            name: self._scalar(name, self.names(name).input_scale).item() for name in self.formats
        }

    @cached_property
    def kv_scales(self) -> dict[str, tuple[float, float]]:
        """Scales of keys and of values by attention module: the largest magnitude over 448."""
        return {
            module: (
                self.stored_scalar(keys.name).item(),
                self.stored_scalar(values.name).item(),
            )
            for module in self.attention
            for keys, values in (kv_scale_tensors(module, self.layout),)
        }

    def names(self, linear: str) -> TensorNames:
        """What follows the name of a quantized linear."""
        return tensor_names(self.layout, self.formats[linear])

    def codes(self, linear: str) -> Tensor:
        """Codes of a quantized linear: E4M3 [N, K], or pairs of E2M1 [N, K / 2]."""
        return read_tensor(self.headers[linear + self.names(linear).weight])

    def weight_scale(self, linear: str) -> Tensor:
        """E4M3 block scales [N, K / 16] of an NVFP4 linear, the 0-dimensional scale of FP8."""
        stored = read_tensor(self.headers[linear + self.names(linear).weight_scale])
        return stored if self.formats[linear] is Format.NVFP4 else stored.reshape(())

    def global_scale(self, linear: str) -> Tensor:
        """What the block scales of an NVFP4 linear are multiplied with, 0-dimensional float32."""
        end = self.names(linear).global_scale
        assert end is not None
        return self._scalar(linear, end)

    def stored_scalar(self, name: str) -> Tensor:
        """A float32 scale as it is stored, 0-dimensional."""
        return read_tensor(self.headers[name]).reshape(())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every source tensor by name: dequantized to BF16 if quantized, else as stored."""
        for header in self.source_headers:
            name = header.name.removesuffix(_WEIGHT)
            if name in self.formats:
                yield header.name, self._dequantize(name)
            else:
                yield header.name, read_tensor(header)

    def _dequantize(self, name: str) -> Tensor:
        codes, scale = self.codes(name), self.weight_scale(name)
        if self.formats[name] is Format.FP8:
            return kernels.dequantize_fp8(codes, scale, dtype=torch.bfloat16)
        return kernels.dequantize_nvfp4(codes, scale, self.global_scale(name), dtype=torch.bfloat16)

    def _scalar(self, linear: str, end: str) -> Tensor:
        stored = self.stored_scalar(linear + end)
        return scale_of(stored) if self.names(linear).stores_reciprocals else stored

    @cached_property
    def _scales(self) -> frozenset[str]:
        """Names of all tensors that stand for none of the source."""
        own = {name + end for name in self.formats for end in self.names(name).scales}
        cached = (kv_scale_tensors(module, self.layout) for module in self.attention)
        return frozenset(own | {tensor.name for pair in cached for tensor in pair})

    def _as_source(self, header: TensorHeader) -> TensorHeader:
        for format in _QUANTIZED:
            name = header.name.removesuffix(tensor_names(self.layout, format).weight)
            if name != header.name and self.formats.get(name) is format:
                rows, columns = header.shape
                packed = 2 if format is Format.NVFP4 else 1
                return dataclasses.replace(
                    header, name=name + _WEIGHT, dtype="BF16", shape=(rows, columns * packed)
                )
        return header


def open_quantized(folder: str | Path) -> QuantizedCheckpoint:
    """Open a folder that `export` has written.

    Raises:
        SourceError: missing, damaged, in another layout, a plain model, or with a quantized linear
            that lacks a scale or has one of the wrong shape.
    """
    path = Path(folder)
    if not path.is_dir():
        raise SourceError(f"the folder {path} does not exist.", fix="check the path.")
    if not (path / CONFIG_FILE).exists():
        raise SourceError(
            f"{path} holds no {CONFIG_FILE}.", fix="pass the folder that export has written."
        )
    config = read_json_object(inside(path, CONFIG_FILE))
    layout = _layout(path, config.get("quantization_config"))
    hidden = text_config(config).get("hidden_size")
    headers = stored_forms.apart(read_checkpoint_headers(path), config, hidden)
    formats, attention = _formats(headers, layout), _attention(headers, layout)
    if not formats and not attention and not (path / AUTOQUANT_FILE).exists():
        raise SourceError(
            f"{path} holds no quantized weights and no {AUTOQUANT_FILE}, which even an export with "
            "every layer in BF16 has: it is a plain model.",
            fix="pass the folder that `autoquant export` or `autoquant search` has written.",
        )
    return QuantizedCheckpoint(
        path=path,
        config=config,
        headers=headers,
        layout=layout,
        formats=formats,
        attention=attention,
    )


def _layout(path: Path, quantization: Any) -> Layout:
    """The layout that config.json names; a checkpoint without quantization has either."""
    if quantization is None:
        return Layout.MODELOPT
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    try:
        return Layout(str(method))
    except ValueError:
        raise SourceError(
            f"{path} is quantized by {method!r}; only {' and '.join(Layout)} are read.",
            fix="pass a checkpoint that `autoquant export` has written.",
        ) from None


def _formats(headers: Headers, layout: Layout) -> dict[str, Format]:
    """Formats by what is stored.

    Raises:
        SourceError: a quantized linear is not stored as its format says, or a scale has no linear.
    """
    formats: dict[str, Format] = {}
    for header in headers:
        for format, dtype in ((Format.NVFP4, "U8"), (Format.FP8, "F8_E4M3")):
            names = tensor_names(layout, format)
            name = header.name.removesuffix(names.weight)
            if name == header.name or header.dtype != dtype:
                continue
            if name + names.weight_scale not in headers:
                raise SourceError(
                    f"{header.file} holds {header.name} in {dtype} without {names.weight_scale}.",
                    fix="export the checkpoint again.",
                )
            formats[name] = format
            _require_stored(headers, layout, name, format)
    _require_owners(headers, layout, formats)
    return formats


def _require_owners(headers: Headers, layout: Layout, formats: Mapping[str, Format]) -> None:
    ends = {end for format in _QUANTIZED for end in tensor_names(layout, format).scales}
    for header in headers:
        end = next((end for end in ends if header.name.endswith(end)), None)
        if end is not None and header.name.removesuffix(end) not in formats:
            raise SourceError(
                f"{header.file} holds {header.name}, and no quantized weight belongs to it.",
                fix="export the checkpoint again.",
            )


def _require_stored(headers: Headers, layout: Layout, name: str, format: Format) -> None:
    weight = headers[name + tensor_names(layout, format).weight]
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
    for expected in stored_tensors(linear, format, layout):
        found = headers.tensors.get(expected.name)
        if found is None:
            raise SourceError(
                f"{weight.file.parent} stores {name} in {format.upper()} without {expected.name}.",
                fix="export the checkpoint again.",
            )
        _require_form(found, expected, format.upper())


def _require_form(found: TensorHeader, expected: StoredTensor, what: str) -> None:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        raise SourceError(
            f"{found.name} is {found.dtype} {list(found.shape)}; {what} stores "
            f"{expected.dtype} {list(expected.shape)}.",
            fix="export the checkpoint again.",
        )


def _attention(headers: Headers, layout: Layout) -> tuple[str, ...]:
    """Attention modules with scales for keys and values, in the order of the files.

    Raises:
        SourceError: a module has one of the two, or one of the wrong shape.
    """
    owners = (attention_of(header.name, layout) for header in headers)
    modules = tuple(dict.fromkeys(owner for owner in owners if owner is not None))
    for module in modules:
        for expected in kv_scale_tensors(module, layout):
            found = headers.tensors.get(expected.name)
            if found is None:
                raise SourceError(
                    f"{module} has a scale for one of its keys and values, and no {expected.name}.",
                    fix="export the checkpoint again.",
                )
            _require_form(found, expected, "an FP8 cache")
    return modules
