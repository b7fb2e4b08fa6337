"""The ModelOpt layout: tensors per linear, and the two JSON files that engines read.

vLLM and SGLang read `quantization_config` of config.json, TensorRT-LLM reads hf_quant_config.json.
Engines look modules up by exact name, by fused name and, in exclusion lists, by substring; the
functions below leave no name whose answer differs between them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autoquant import grouping_table as table
from autoquant.assignment import Assignment
from autoquant.checkpoint.headers import Headers
from autoquant.formats import NVFP4_BLOCK, Format
from autoquant.grouping import Groups
from autoquant.groups import Linear

QUANTIZATION_FILE = "hf_quant_config.json"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""vLLM and SGLang read the files of no other producer; the version is the layout's."""

WEIGHT_SCALE = ".weight_scale"
GLOBAL_SCALE = ".weight_scale_2"
INPUT_SCALE = ".input_scale"

_HEAD = "lm_head"
_DISK_BLOCK, _ENGINE_BLOCK = "block_sparse_moe", "mlp"
"""transformers and engines hold under `mlp` what these checkpoints store as `block_sparse_moe`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor that the exported checkpoint stores."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(linear: Linear, format: Format) -> tuple[StoredTensor, ...]:
    """What a quantized linear stores, its weight first."""
    rows, columns = linear.out_features, linear.in_features
    scalars = [StoredTensor(name=linear.name + INPUT_SCALE, dtype="F32", shape=())]
    if format is Format.FP8:
        weight = StoredTensor(name=linear.tensor, dtype="F8_E4M3", shape=(rows, columns))
        scale = StoredTensor(name=linear.name + WEIGHT_SCALE, dtype="F32", shape=())
    else:
        weight = StoredTensor(name=linear.tensor, dtype="U8", shape=(rows, columns // 2))
        scale = StoredTensor(
            name=linear.name + WEIGHT_SCALE, dtype="F8_E4M3", shape=(rows, columns // NVFP4_BLOCK)
        )
        scalars.insert(0, StoredTensor(name=linear.name + GLOBAL_SCALE, dtype="F32", shape=()))
    return weight, scale, *scalars


def quantization_files(
    headers: Headers, groups: Groups, assignment: Assignment
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """`quantization_config` of config.json and the content of hf_quant_config.json.

    Returns:
        None if the assignment quantizes nothing.
    """
    formats = {
        linear.name: assignment[group.name].format
        for group in groups
        for linear in group.linears
        if assignment[group.name].format is not Format.BF16
    }
    if not formats:
        return None
    ignore = _unquantized_modules(headers, groups, formats)
    safe = _without_traps(ignore, formats)
    used = set(formats.values())
    if len(used) > 1 or safe != ignore:
        algorithm, layers = "MIXED_PRECISION", _quantized_layers(formats)
    else:
        algorithm, layers = used.pop().upper(), None
    return _flat(algorithm, layers, safe, formats), _nested(algorithm, layers, safe, formats)


def _unquantized_modules(
    headers: Headers, groups: Groups, formats: Mapping[str, Format]
) -> list[str]:
    """Every module that holds a matrix and stays as it is, and the containers of its experts."""
    modules = [linear.name for linear in groups.linears if linear.name not in formats]
    matrices = (tensor.name for tensor in groups.fixed if len(headers[tensor.name].shape) >= 2)
    modules += (name.removesuffix(".weight") for name in matrices)
    if _HEAD not in formats:
        modules.append(_HEAD)
    quantized = set(map(_experts_container, formats))
    named: dict[str, None] = {}
    for module in modules:
        container = _experts_container(module)
        named |= dict.fromkeys(_spellings(module) if container is None else (module,))
        if container is not None and container not in quantized:
            named |= dict.fromkeys(_spellings(container))
    return list(named)


def _quantized_layers(formats: Mapping[str, Format]) -> dict[str, dict[str, Any]]:
    """Every quantized linear, and the container that engines look experts up by."""
    layers: dict[str, dict[str, Any]] = {}
    for name, format in formats.items():
        layers[name] = _algorithm(format)
        container = _experts_container(name)
        if container is not None:
            layers |= dict.fromkeys(_spellings(container), _algorithm(format))
    return layers


def _experts_container(name: str) -> str | None:
    """`...mlp.experts` of an expert's linear, or of experts stored as one tensor."""
    match = table.ROUTED_EXPERT.fullmatch(name)
    if match:
        return match["container"]
    return name.rpartition(".")[0] if table.FUSED_EXPERTS.fullmatch(name) else None


def _spellings(name: str) -> tuple[str, ...]:
    other = name.replace(f".{_DISK_BLOCK}.", f".{_ENGINE_BLOCK}.")
    return (name,) if other == name else (name, other)


def _without_traps(ignore: list[str], formats: Mapping[str, Format]) -> list[str]:
    """Drop names that are part of a quantized module's name.

    vLLM excludes a module if an entry occurs anywhere in its name: `mlp.gate` would exclude
    `mlp.gate_up_proj` too.
    """
    in_layer: dict[str, str] = {}
    everywhere = ""
    for taken in {spelling for name in formats for spelling in _engine_names(name)}:
        layer = _layer(taken)
        in_layer[layer] = f"{in_layer.get(layer, '')}\n{taken}"
        everywhere += f"\n{taken}"
    return [
        name
        for name in ignore
        if name not in (in_layer.get(_layer(name), "") if _layer(name) else everywhere)
    ]


def _engine_names(name: str) -> Iterable[str]:
    parent, _, last = name.rpartition(".")
    yield from _spellings(name)
    for row in table.FUSED:
        if last in row.parts and not table.ROUTED_EXPERT.fullmatch(name):
            yield f"{parent}.{row.engine_name}"
    container = _experts_container(name)
    if container is not None:
        yield from _spellings(container)


def _layer(name: str) -> str:
    match = table.LAYER.fullmatch(name)
    return match["layer"] if match else ""


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
    return config | {"ignore": ignore, "kv_cache_scheme": None}


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
    quantization: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
    if Format.NVFP4 in formats.values():
        quantization["group_size"] = NVFP4_BLOCK
    quantization["exclude_modules"] = ignore
    if layers is not None:
        quantization["quantized_layers"] = layers
    return {"producer": PRODUCER, "quantization": quantization}
