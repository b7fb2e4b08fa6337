"""The format that serving engines give a module, by the JSON files of a checkpoint.

Follows vLLM, the strictest reader. In the ModelOpt layout (`ModelOptMixedPrecisionConfig`),
exclusion comes first, by exact name, by a part of a fused matrix or by any substring; then the
exact entry, or that of the experts. In the compressed-tensors layout (`CompressedTensorsConfig`),
exclusion is by exact name, and targets are names, expressions or the class of all linears.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from autoquant.export.layouts import compressed_tensors as ct
from autoquant.export.layouts.base import Layout
from autoquant.export.layouts.modelopt import form_of_algorithm
from autoquant.export.layouts.modules import is_head, layer_of, spellings
from autoquant.formats import BF16
from autoquant.source import names as table

_MOST_REPEATS = 4
"""Of an expression: each multiplies the time that a match may take by the length of a name."""

_PLAIN = BF16.form
"""What a module is that no entry names."""


@dataclass(frozen=True, kw_only=True)
class EngineView(ABC):
    """What a declaration says."""

    fp8_kv_cache: bool

    @abstractmethod
    def form(self, module: str) -> str:
        """What a linear is taken for, by its name on disk: `nvfp4`, `nvfp4/a16`, `fp8`, `bf16`."""


Names = Mapping[str, tuple[str, ...]]
"""What engines call the matrices in which they join linears, by the linear's name on disk; see
`plan.grouping.engine_names`."""


def modelopt_views(
    flat: Mapping[str, Any], nested: Mapping[str, Any], names: Names
) -> tuple["ModeloptView", "ModeloptView"]:
    """What `quantization_config` and hf_quant_config.json say, which is to be the same.

    Raises:
        KeyError: one lacks a key that engines need.
        TypeError: a value is of another type than engines read.
    """
    inner = _mapping("quantization", nested["quantization"])
    return (
        _flat_view(flat, names),
        ModeloptView(
            names=names,
            algorithm=_text("quant_algo", inner["quant_algo"]),
            layers=_layers(inner.get("quantized_layers")),
            excluded=_names("exclude_modules", inner["exclude_modules"]),
            fp8_kv_cache=inner["kv_cache_quant_algo"] is not None,
        ),
    )


def _flat_view(flat: Mapping[str, Any], names: Names) -> "ModeloptView":
    return ModeloptView(
        names=names,
        algorithm=_text("quant_algo", _mapping("quantization_config", flat)["quant_algo"]),
        layers=_layers(flat.get("quantized_layers")),
        excluded=_names("ignore", flat["ignore"]),
        fp8_kv_cache=flat["kv_cache_scheme"] is not None,
    )


def _layers(layers: Any) -> Mapping[str, Mapping[str, Any]] | None:
    if layers is None:
        return None
    for name, own in _mapping("quantized_layers", layers).items():
        _text(f"quant_algo of {name}", _mapping(name, own).get("quant_algo", ""))
    return dict(layers)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is no mapping")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is no text")
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
        raise TypeError(f"{name} is no list of names")
    return tuple(value)


def _expression(target: str) -> re.Pattern[str]:
    """The expression of a target.

    Raises:
        TypeError: it cannot be compiled, or repeats a group or many characters, which could take
            for ever to match.
    """
    text = target.removeprefix(ct.EXPRESSION)
    plain = re.sub(r"\\.", "x", text)
    if re.search(r"\)[*+{]", plain) or len(re.findall(r"[*+{]", plain)) > _MOST_REPEATS:
        raise TypeError(f"the expression {text!r} repeats too much")
    try:
        return re.compile(text)
    except re.error as error:
        raise TypeError(f"the expression {text!r} cannot be read ({error})") from None


def view_of(layout: Layout, config: Mapping[str, Any] | None, names: Names) -> "EngineView | None":
    """What `quantization_config` of config.json says; None where it lacks what engines need."""
    try:
        if layout is Layout.MODELOPT:
            return _flat_view(config or {}, names)
        return compressed_tensors_view(config or {})
    except (KeyError, TypeError):
        return None


def compressed_tensors_view(config: Mapping[str, Any]) -> "CompressedTensorsView":
    """What `quantization_config` says.

    Raises:
        KeyError: it lacks a key that engines need.
        TypeError: a value is of another type than engines read.
    """
    targets: dict[str, str] = {}
    groups = _mapping("quantization_config", config)["config_groups"]
    for name, group in _mapping("config_groups", groups).items():
        _mapping(f"weights of {name}", _mapping(name, group)["weights"])
        form = ct.form_of_group(group)
        targets |= dict.fromkeys(_names(f"targets of {name}", group["targets"]), form)
    for target in targets:
        if target.startswith(ct.EXPRESSION):
            _expression(target)
    return CompressedTensorsView(
        targets=targets,
        excluded=frozenset(_names("ignore", config["ignore"])),
        fp8_kv_cache=config.get("kv_cache_scheme") is not None,
    )


@dataclass(frozen=True, kw_only=True)
class ModeloptView(EngineView):
    """What one of the two ModelOpt files declares."""

    names: Names = field(repr=False)
    algorithm: str
    """Of all layers, or that each has its own."""
    layers: Mapping[str, Mapping[str, Any]] | None
    """Entries by module; None where one algorithm holds for all."""
    excluded: tuple[str, ...]
    """Modules that stay as they are."""
    _answers: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    def form(self, module: str) -> str:
        expert = table.ROUTED_EXPERT.fullmatch(module)
        held = (expert["container"],) if expert else self.names.get(module, (module,))
        if any(map(self._is_excluded, held)):
            return _PLAIN
        if self.layers is None:
            return form_of_algorithm(self.algorithm) or _PLAIN
        names = [module, *(spellings(expert["container"]) if expert else ())]
        found = {self.layers.get(name, {}).get("quant_algo", "") for name in names}
        return (form_of_algorithm(found.pop()) or _PLAIN) if len(found) == 1 else _PLAIN

    @cached_property
    def _excluded_in_layer(self) -> dict[str, list[str]]:
        """Only entries of a module's own layer, or outside of all, can be part of its name."""
        nearby: dict[str, list[str]] = {}
        for name in self.excluded:
            nearby.setdefault(layer_of(name), []).append(name)
        return nearby

    @cached_property
    def _parts(self) -> dict[str, set[str]]:
        """The linears that a matrix of the engine's holds."""
        parts: dict[str, set[str]] = {}
        for linear, names in self.names.items():
            for name in names:
                parts.setdefault(name, set()).add(linear)
        return parts

    def _is_excluded(self, name: str) -> bool:
        if name not in self._answers:
            layer = layer_of(name)
            entries = self._excluded_in_layer.get(layer, [])
            if layer:
                entries = entries + self._excluded_in_layer.get("", [])
            parts = self._parts.get(name, ())
            self._answers[name] = any(entry in name or entry in parts for entry in entries)
        return self._answers[name]


@dataclass(frozen=True, kw_only=True)
class CompressedTensorsView(EngineView):
    """What `quantization_config` declares."""

    targets: Mapping[str, str]
    """Forms by module name, expression or class."""
    excluded: frozenset[str]
    """Modules that stay as they are."""

    def form(self, module: str) -> str:
        found = {self._form(name) for name in spellings(module)}
        return found.pop() if len(found) == 1 else _PLAIN

    def _form(self, name: str) -> str:
        if name in self.excluded:
            return _PLAIN
        if name in self.targets:
            return self.targets[name]
        for expression, form in self._expressions:
            if expression.match(name):
                return form
        if is_head(name):
            return _PLAIN
        return self.targets.get(ct.ANY_LINEAR, _PLAIN)

    @cached_property
    def _expressions(self) -> list[tuple[re.Pattern[str], str]]:
        return [
            (_expression(target), form)
            for target, form in self.targets.items()
            if target.startswith(ct.EXPRESSION)
        ]
