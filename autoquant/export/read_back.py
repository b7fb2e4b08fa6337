"""An exported checkpoint, read back as the source tensors that it stands for."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from autoquant.errors import SourceError
from autoquant.export.companions import AUTOQUANT_FILE
from autoquant.export.kv_scales import attention_of, kv_scale_tensors
from autoquant.export.layouts.base import Layout, StoredTensor, form_of, stored_tensors
from autoquant.export.layouts.compressed_tensors import scale_of
from autoquant.export.layouts.engine_view import EngineView, view_of
from autoquant.formats import (
    A16,
    BF16,
    CODES,
    INPUT_SCALE,
    SCALE,
    Choice,
    LayoutForm,
    all_formats,
)
from autoquant.formats.packed import Packed
from autoquant.plan.grouping import Groups, engine_names, group_tensors
from autoquant.plan.linears import Linear
from autoquant.source import stored_forms
from autoquant.source.headers import Headers, TensorHeader
from autoquant.source.shards import read_checkpoint_headers
from autoquant.source.source import CONFIG_FILE, read_config, text_config
from autoquant.source.tensors import read_tensor

_WEIGHT = ".weight"


def stored_choices(layout: Layout) -> tuple[Choice, ...]:
    """The default choice of every format that a layout holds: the scale rule and the rounding
    cannot be read off a checkpoint, and do not matter to who loads it.
    """
    return tuple(Choice.parse(f.name) for f in all_formats() if layout in f.layouts)


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint:
    """A checkpoint whose tensors have the names and shapes of its layout."""

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    headers: Headers = field(repr=False)
    """What is stored."""
    layout: Layout
    choices: Mapping[str, Choice] = field(repr=False)
    """Choice of every quantized linear, by its name on disk; scale rule and rounding are nominal,
    for they cannot be read off a checkpoint."""
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
        """Input scale of every linear whose inputs are quantized, float32."""
        return {
            name: self._scalar(name, INPUT_SCALE).item()
            for name, choice in self.choices.items()
            if not choice.keeps_input
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

    def choice(self, linear: str) -> Choice:
        """What a linear is stored in; BF16 is as in the source."""
        return self.choices.get(linear, BF16)

    def form(self, linear: str) -> LayoutForm:
        """How the layout holds a quantized linear."""
        return form_of(self.layout, self.choices[linear].format)

    def scalars(self, linear: str) -> dict[str, str]:
        """Names of the per-tensor float32 scales of a quantized linear, by part."""
        stored = stored_tensors(_linear(linear, 1, 16), self.choices[linear], self.layout)
        return {part: own.name for part, own in stored.items() if own.dtype == "F32"}

    def packed(self, linear: str) -> Packed:
        """The codes of a quantized linear as stored, per-tensor scales as they multiply."""
        choice, form = self.choices[linear], self.form(linear)
        scalars = self.scalars(linear)
        parts = {}
        for part, end in form.names.items():
            if part in scalars and part != INPUT_SCALE:
                parts[part] = self._scalar(linear, part)
            elif part != INPUT_SCALE:
                parts[part] = read_tensor(self.headers[linear + end])
        return Packed(choice, parts)

    def stored_scalar(self, name: str) -> Tensor:
        """A float32 scale as it is stored, 0-dimensional."""
        return read_tensor(self.headers[name]).reshape(())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every source tensor by name: dequantized to BF16 if quantized, else as stored."""
        for header in self.source_headers:
            name = header.name.removesuffix(_WEIGHT)
            if name in self.choices:
                yield header.name, self.packed(name).decode()
            else:
                yield header.name, read_tensor(header)

    def _scalar(self, linear: str, part: str) -> Tensor:
        form = self.form(linear)
        stored = self.stored_scalar(linear + form.names[part])
        return scale_of(stored) if part in form.reciprocals else stored

    @cached_property
    def _scales(self) -> frozenset[str]:
        """Names of all tensors that stand for none of the source."""
        own = {
            name + end
            for name in self.choices
            for part, end in self.form(name).names.items()
            if part != CODES
        }
        cached = (kv_scale_tensors(module, self.layout) for module in self.attention)
        return frozenset(own | {tensor.name for pair in cached for tensor in pair})

    def _as_source(self, header: TensorHeader) -> TensorHeader:
        for choice in stored_choices(self.layout):
            name = header.name.removesuffix(form_of(self.layout, choice.format).names[CODES])
            if name != header.name and self.choice(name).format == choice.format:
                shape = (header.shape[0], _columns(choice, header.shape[1]))
                return dataclasses.replace(header, name=name + _WEIGHT, dtype="BF16", shape=shape)
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
    config = read_config(path)
    layout = _layout(path, config.get("quantization_config"))
    hidden = text_config(config).get("hidden_size")
    headers = stored_forms.apart(read_checkpoint_headers(path), config, hidden)
    names = engine_names((h.name.rpartition(".")[0] for h in headers), config, text_config(config))
    view = view_of(layout, config.get("quantization_config"), names)
    choices, attention = _choices(headers, layout, view), _attention(headers, layout)
    if not choices and not attention and not (path / AUTOQUANT_FILE).exists():
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
        choices=choices,
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


def _choices(headers: Headers, layout: Layout, view: EngineView | None) -> dict[str, Choice]:
    """Choices by what is stored, and BF16 inputs by what is declared: engines that miss an input
    scale would not say so.

    Raises:
        SourceError: a quantized linear is not stored as its format says, or a scale has no linear.
    """
    choices: dict[str, Choice] = {}
    for header in headers:
        for choice in stored_choices(layout):
            form = form_of(layout, choice.format)
            name = header.name.removesuffix(form.names[CODES])
            dtype = choice.format.parts(1, 16, choice)[CODES].dtype
            if name == header.name or header.dtype != dtype:
                continue
            if name + form.names[SCALE] not in headers:
                raise SourceError(
                    f"{header.file} holds {header.name} in {dtype} without {form.names[SCALE]}.",
                    fix="export the checkpoint again.",
                )
            choices[name] = choice
            if A16 in choice.format.inputs:
                plain = dataclasses.replace(choice, input=A16)
                if view is not None and view.form(name) == plain.form:
                    choices[name] = plain
            _require_stored(headers, layout, name, choices[name])
    _require_owners(headers, layout, choices)
    return choices


def _require_owners(headers: Headers, layout: Layout, choices: Mapping[str, Choice]) -> None:
    ends = {
        end
        for choice in stored_choices(layout)
        for part, end in form_of(layout, choice.format).names.items()
        if part != CODES
    }
    for header in headers:
        end = next((end for end in ends if header.name.endswith(end)), None)
        if end is not None and header.name.removesuffix(end) not in choices:
            raise SourceError(
                f"{header.file} holds {header.name}, and no quantized weight belongs to it.",
                fix="export the checkpoint again.",
            )


def _require_stored(headers: Headers, layout: Layout, name: str, choice: Choice) -> None:
    weight = headers[name + form_of(layout, choice.format).names[CODES]]
    if len(weight.shape) != 2:
        raise SourceError(
            f"{weight.name} has shape {list(weight.shape)}; a quantized weight has two axes.",
            fix="export the checkpoint again.",
        )
    linear = _linear(name, weight.shape[0], _columns(choice, weight.shape[1]))
    for expected in stored_tensors(linear, choice, layout).values():
        found = headers.tensors.get(expected.name)
        if found is None:
            raise SourceError(
                f"{weight.file.parent} stores {name} in {choice.format.label} without "
                f"{expected.name}.",
                fix="export the checkpoint again.",
            )
        _require_form(found, expected, choice.format.label)


def _columns(choice: Choice, stored: int) -> int:
    """Inputs of a linear whose codes have `stored` columns."""
    return stored * 16 // choice.format.parts(1, 16, choice)[CODES].shape[1]


def _linear(name: str, out_features: int, in_features: int) -> Linear:
    return Linear(
        name=name,
        out_features=out_features,
        in_features=in_features,
        weight_scale_set=name,
        input_scale_set=name,
    )


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
