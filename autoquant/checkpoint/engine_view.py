"""The format that serving engines give a module, by the JSON files of a checkpoint.

Follows vLLM's `ModelOptMixedPrecisionConfig`, the strictest reader: exclusion comes first, by exact
name, by a part of a fused matrix or by any substring; then the exact entry, or that of the experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from autoquant import grouping_table as table
from autoquant.formats import Format

_ALGORITHMS = {"NVFP4": Format.NVFP4, "FP8": Format.FP8}


@dataclass(frozen=True, kw_only=True)
class EngineView:
    """What one of the two files declares."""

    algorithm: str
    """`MIXED_PRECISION`, `NVFP4` or `FP8`."""
    layers: Mapping[str, Mapping[str, Any]] | None
    """Entries by module; None where one algorithm holds for all."""
    excluded: tuple[str, ...]
    """Modules that stay as they are."""
    _answers: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def flat(cls, config: Mapping[str, Any]) -> Self:
        """From `quantization_config` of config.json; KeyError if it lacks a key engines need."""
        if "kv_cache_scheme" not in config:
            raise KeyError("kv_cache_scheme")
        layers = config.get("quantized_layers")
        return cls(algorithm=config["quant_algo"], layers=layers, excluded=tuple(config["ignore"]))

    @classmethod
    def nested(cls, config: Mapping[str, Any]) -> Self:
        """From hf_quant_config.json; KeyError if it lacks a key engines need."""
        inner = config["quantization"]
        if "kv_cache_quant_algo" not in inner:
            raise KeyError("kv_cache_quant_algo")
        layers, excluded = inner.get("quantized_layers"), tuple(inner["exclude_modules"])
        return cls(algorithm=inner["quant_algo"], layers=layers, excluded=excluded)

    def format(self, module: str) -> Format:
        """The format of a linear by its name on disk."""
        expert = table.ROUTED_EXPERT.fullmatch(module)
        if self._is_excluded(expert["container"] if expert else _engine_name(module)):
            return Format.BF16
        if self.layers is None:
            return _ALGORITHMS.get(self.algorithm, Format.BF16)
        names = [module]
        if expert:
            container = expert["container"]
            names += [container, container.replace(".block_sparse_moe.", ".mlp.")]
        found = {self.layers.get(name, {}).get("quant_algo", "") for name in names}
        return _ALGORITHMS.get(found.pop(), Format.BF16) if len(found) == 1 else Format.BF16

    @cached_property
    def _excluded_in_layer(self) -> dict[str, list[str]]:
        """Only entries of a module's own layer, or outside of all, can be part of its name."""
        nearby: dict[str, list[str]] = {}
        for name in self.excluded:
            nearby.setdefault(_layer(name), []).append(name)
        return nearby

    def _is_excluded(self, name: str) -> bool:
        if name not in self._answers:
            layer = _layer(name)
            entries = self._excluded_in_layer.get(layer, [])
            if layer:
                entries = entries + self._excluded_in_layer.get("", [])
            parent, _, last = name.rpartition(".")
            rows = (row for row in table.FUSED if row.engine_name == last)
            parts = {f"{parent}.{part}" for row in rows for part in row.parts}
            self._answers[name] = any(entry in name or entry in parts for entry in entries)
        return self._answers[name]


def _engine_name(module: str) -> str:
    """The name of the fused matrix in which engines hold the module, or its own."""
    parent, _, last = module.rpartition(".")
    row = next((row for row in table.FUSED if last in row.parts), None)
    return f"{parent}.{row.engine_name}" if row else module


def _layer(name: str) -> str:
    match = table.LAYER.fullmatch(name)
    return match["layer"] if match else ""
