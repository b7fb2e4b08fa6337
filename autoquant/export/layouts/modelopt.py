"""The ModelOpt layout: tensors per linear, and the two JSON files that engines read.

vLLM and SGLang read `quantization_config` of config.json, TensorRT-LLM reads hf_quant_config.json.
Engines look modules up by exact name, by fused name and, in exclusion lists, by substring; the
functions below leave no name whose answer differs between them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from autoquant.export.layouts.modules import (
    experts_container,
    layer_of,
    spellings,
    unquantized_modules,
)
from autoquant.formats import NVFP4_BLOCK, Format
from autoquant.plan.grouping import Groups
from autoquant.source import names as table
from autoquant.source.headers import Headers

QUANTIZATION_FILE = "hf_quant_config.json"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""vLLM and SGLang read the files of no other producer; the version is the layout's."""


def quantization_files(
    headers: Headers, groups: Groups, formats: Mapping[str, Format], *, fp8_kv_cache: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`quantization_config` of config.json and the content of hf_quant_config.json.

    Args:
        headers: the source's tensors.
        groups: its layer groups.
        formats: format of every quantized linear by name; at least one.
        fp8_kv_cache: whether the checkpoint holds scales of an FP8 cache.
    """
    ignore = unquantized_modules(headers, groups, formats)
    safe = _without_traps(ignore, formats)
    used = set(formats.values())
    if len(used) > 1 or safe != ignore:
        algorithm, layers = "MIXED_PRECISION", _quantized_layers(formats)
    else:
        algorithm, layers = used.pop().upper(), None
    flat = _flat(algorithm, layers, safe, formats)
    nested = _nested(algorithm, layers, safe, formats)
    flat["kv_cache_scheme"] = _numbers(Format.FP8) if fp8_kv_cache else None
    nested["quantization"]["kv_cache_quant_algo"] = "FP8" if fp8_kv_cache else None
    return flat, nested


def _quantized_layers(formats: Mapping[str, Format]) -> dict[str, dict[str, Any]]:
    """Every quantized linear, and the container that engines look experts up by."""
    layers: dict[str, dict[str, Any]] = {}
    for name, format in formats.items():
        layers[name] = _algorithm(format)
        container = experts_container(name)
        if container is not None:
            layers |= dict.fromkeys(spellings(container), _algorithm(format))
    return layers


def _without_traps(ignore: list[str], formats: Mapping[str, Format]) -> list[str]:
    """Drop names that are part of a quantized module's name.

    vLLM excludes a module if an entry occurs anywhere in its name: `mlp.gate` would exclude
    `mlp.gate_up_proj` too.
    """
    in_layer: dict[str, str] = {}
    everywhere = ""
    for taken in {spelling for name in formats for spelling in _engine_names(name)}:
        layer = layer_of(taken)
        in_layer[layer] = f"{in_layer.get(layer, '')}\n{taken}"
        everywhere += f"\n{taken}"
    return [
        name
        for name in ignore
        if name not in (in_layer.get(layer_of(name), "") if layer_of(name) else everywhere)
    ]


def _engine_names(name: str) -> Iterable[str]:
    parent, _, last = name.rpartition(".")
    yield from spellings(name)
    for row in table.FUSED:
        if last in row.parts and not table.ROUTED_EXPERT.fullmatch(name):
            yield f"{parent}.{row.engine_name}"
    container = experts_container(name)
    if container is not None:
        yield from spellings(container)


def _algorithm(format: Format) -> dict[str, Any]:
    if format is Format.NVFP4:
        return {"quant_algo": "NVFP4", "group_size": NVFP4_BLOCK}
    return {"quant_algo": "FP8"}


def _flat(
    algorithm: str,
    layers: dict[str, dict[str, Any]] | None,
    ignore: list[str],
    formats: Mapping[str, Format],
) -> dict[str, Any]:
    config: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": algorithm}
    config["producer"] = PRODUCER
    if Format.NVFP4 in formats.values():
        config["group_size"] = NVFP4_BLOCK
    groups = {}
    for number, format in enumerate(sorted(set(formats.values()), key=list(Format).index)):
        targets = [name for name, own in formats.items() if own is format] if layers else ["Linear"]
        numbers = _numbers(format)
        groups[f"group_{number}"] = {
            "weights": numbers,
            "input_activations": numbers,
            "targets": targets,
        }
    config["config_groups"] = groups
    if layers is not None:
        config["quantized_layers"] = layers
    return config | {"ignore": ignore}


def _numbers(format: Format) -> dict[str, Any]:
    if format is Format.NVFP4:
        return {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4_BLOCK}
    return {"dynamic": False, "num_bits": 8, "type": "float"}


def _nested(
    algorithm: str,
    layers: dict[str, dict[str, Any]] | None,
    ignore: list[str],
    formats: Mapping[str, Format],
) -> dict[str, Any]:
    quantization: dict[str, Any] = {"quant_algo": algorithm}
    if Format.NVFP4 in formats.values():
        quantization["group_size"] = NVFP4_BLOCK
    quantization["exclude_modules"] = ignore
    if layers is not None:
        quantization["quantized_layers"] = layers
    return {"producer": PRODUCER, "quantization": quantization}
