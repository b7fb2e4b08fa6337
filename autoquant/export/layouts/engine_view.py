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
from autoquant.export.layouts.modules import engine_name, is_head, layer_of, spellings
from autoquant.formats import Format
from autoquant.source import names as table

_ALGORITHMS = {"NVFP4": Format.NVFP4, "FP8": Format.FP8}
_BITS = {4: Format.NVFP4, 8: Format.FP8}


@dataclass(frozen=True, kw_only=True)
class EngineView(ABC):
    """What a declaration says."""

    fp8_kv_cache: bool

    @abstractmethod
    def format(self, module: str) -> Format:
        """The format of a linear by its name on disk."""


def modelopt_views(
    flat: Mapping[str, Any], nested: Mapping[str, Any]
) -> tuple["ModeloptView", "ModeloptView"]:
    """What `quantization_config` and hf_quant_config.json say, which is to be the same.

    Raises:
        KeyError: one lacks a key that engines need.
    """
    inner = nested["quantization"]
    return (
        ModeloptView(
            algorithm=flat["quant_algo"],
            layers=flat.get("quantized_layers"),
            excluded=tuple(flat["ignore"]),
            fp8_kv_cache=flat["kv_cache_scheme"] is not None,
        ),
        ModeloptView(
            algorithm=inner["quant_algo"],
            layers=inner.get("quantized_layers"),
            excluded=tuple(inner["exclude_modules"]),
            fp8_kv_cache=inner["kv_cache_quant_algo"] is not None,
        ),
    )


def compressed_tensors_view(config: Mapping[str, Any]) -> "CompressedTensorsView":
    """What `quantization_config` says.

    Raises:
        KeyError: it lacks a key that engines need.
    """
    targets: dict[str, Format] = {}
    for group in config["config_groups"].values():
        targets |= dict.fromkeys(group["targets"], _BITS[group["weights"]["num_bits"]])
    return CompressedTensorsView(
        targets=targets,
        excluded=frozenset(config["ignore"]),
        fp8_kv_cache=config.get("kv_cache_scheme") is not None,
    )


@dataclass(frozen=True, kw_only=True)
class ModeloptView(EngineView):
    """What one of the two ModelOpt files declares."""

    algorithm: str
    """`MIXED_PRECISION`, `NVFP4` or `FP8`."""
    layers: Mapping[str, Mapping[str, Any]] | None
    """Entries by module; None where one algorithm holds for all."""
    excluded: tuple[str, ...]
    """Modules that stay as they are."""
    _answers: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    def format(self, module: str) -> Format:
        expert = table.ROUTED_EXPERT.fullmatch(module)
        if self._is_excluded(expert["container"] if expert else engine_name(module)):
            return Format.BF16
        if self.layers is None:
            return _ALGORITHMS.get(self.algorithm, Format.BF16)
        names = [module, *(spellings(expert["container"]) if expert else ())]
        found = {self.layers.get(name, {}).get("quant_algo", "") for name in names}
        return _ALGORITHMS.get(found.pop(), Format.BF16) if len(found) == 1 else Format.BF16

    @cached_property
    def _excluded_in_layer(self) -> dict[str, list[str]]:
        """Only entries of a module's own layer, or outside of all, can be part of its name."""
        nearby: dict[str, list[str]] = {}
        for name in self.excluded:
            nearby.setdefault(layer_of(name), []).append(name)
        return nearby

    def _is_excluded(self, name: str) -> bool:
        if name not in self._answers:
            layer = layer_of(name)
            entries = self._excluded_in_layer.get(layer, [])
            if layer:
                entries = entries + self._excluded_in_layer.get("", [])
            parent, _, last = name.rpartition(".")
            rows = (row for row in table.FUSED if row.engine_name == last)
            parts = {f"{parent}.{part}" for row in rows for part in row.parts}
            self._answers[name] = any(entry in name or entry in parts for entry in entries)
        return self._answers[name]


@dataclass(frozen=True, kw_only=True)
class CompressedTensorsView(EngineView):
    """What `quantization_config` declares."""

    targets: Mapping[str, Format]
    """Formats by module name, expression or class."""
    excluded: frozenset[str]
    """Modules that stay as they are."""

    def format(self, module: str) -> Format:
        found = {self._format(name) for name in spellings(module)}
        return found.pop() if len(found) == 1 else Format.BF16

    def _format(self, name: str) -> Format:
        if name in self.excluded:
            return Format.BF16
        if name in self.targets:
            return self.targets[name]
        for expression, format in self._expressions:
            if expression.match(name):
                return format
        if is_head(name):
            return Format.BF16
        return self.targets.get(ct.ANY_LINEAR, Format.BF16)

    @cached_property
    def _expressions(self) -> list[tuple[re.Pattern[str], Format]]:
        mark = ct.EXPRESSION
        return [
            (re.compile(target.removeprefix(mark)), format)
            for target, format in self.targets.items()
            if target.startswith(mark)
        ]
