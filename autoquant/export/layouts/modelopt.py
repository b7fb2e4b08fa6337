"""The ModelOpt layout: tensors per linear, and the two JSON files that engines read.

vLLM and SGLang read `quantization_config` of config.json, TensorRT-LLM reads hf_quant_config.json.
Engines look modules up by exact name, by fused name and, in exclusion lists, by substring; the
functions below leave no name whose answer differs between them.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import autoquant
from autoquant.export.layouts.base import Layout, form_of
from autoquant.export.layouts.modules import (
    disputed_names,
    experts_container,
    layer_of,
    spellings,
    unquantized_modules,
)
from autoquant.formats import Choice, all_formats
from autoquant.plan.grouping import Groups
from autoquant.plan.linears import Linear
from autoquant.source.headers import Headers

QUANTIZATION_FILE = "hf_quant_config.json"
PRODUCER = {"name": "modelopt", "version": "0.47.0", "autoquant": autoquant.__version__}
"""vLLM and SGLang read the files of no producer with another `name`. `version` is the layout's,
`autoquant` the version that wrote the checkpoint."""

MIXED = "MIXED_PRECISION"
KV_CACHE_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}


_FIRST_PROJECTIONS = frozenset({"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"})


def quantization_files(
    headers: Headers, groups: Groups, choices: Mapping[str, Choice], *, fp8_kv_cache: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`quantization_config` of config.json and the content of hf_quant_config.json.

    Args:
        headers: the source's tensors.
        groups: its layer groups.
        choices: of every quantized linear by name; at least one.
        fp8_kv_cache: whether the checkpoint holds scales of an FP8 cache.
    """
    ignore = unquantized_modules(headers, groups, choices)
    safe = _without_traps(ignore, groups, choices)
    algorithms = {_algorithm(choice)["quant_algo"] for choice in choices.values()}
    if len(algorithms) > 1 or safe != ignore or _keeps_inputs(choices):
        algorithm, layers = MIXED, _quantized_layers(groups, choices)
    else:
        algorithm, layers = algorithms.pop(), None
    flat = _flat(algorithm, layers, safe, choices)
    nested = _nested(algorithm, layers, safe, choices)
    flat["kv_cache_scheme"] = KV_CACHE_SCHEME if fp8_kv_cache else None
    nested["quantization"]["kv_cache_quant_algo"] = "FP8" if fp8_kv_cache else None
    return flat, nested


def _quantized_layers(groups: Groups, choices: Mapping[str, Choice]) -> dict[str, dict[str, Any]]:
    """Every quantized linear, and what engines call the matrices that hold them."""
    layers: dict[str, dict[str, Any]] = {}
    disputed = disputed_names(groups, choices)
    for linear in groups.linears:
        choice = choices.get(linear.name)
        if choice is None:
            continue
        layers[linear.name] = _algorithm(choice)
        container = experts_container(linear.name)
        names = linear.engine_names if container is None else spellings(container)
        layers |= dict.fromkeys((n for n in names if n not in disputed), _algorithm(choice))
    return layers


def _keeps_inputs(choices: Mapping[str, Choice]) -> bool:
    """Whether some layer differs by its inputs, which engines look up layer by layer alone."""
    return any(choice.input for choice in choices.values())


def _without_traps(ignore: list[str], groups: Groups, choices: Mapping[str, Choice]) -> list[str]:
    """Drop names that are part of a quantized module's name.

    vLLM excludes a module if an entry occurs anywhere in its name: `mlp.gate` would exclude
    `mlp.gate_up_proj` too.
    """
    in_layer: dict[str, str] = {}
    everywhere = ""
    quantized = (linear for linear in groups.linears if linear.name in choices)
    taken = {name for linear in quantized for name in _looked_up(linear)}
    for name in taken:
        layer = layer_of(name)
        in_layer[layer] = f"{in_layer.get(layer, '')}\n{name}"
        everywhere += f"\n{name}"
    lasts = "\n".join({name.rpartition(".")[2] for name in taken})
    return [
        name
        for name in ignore
        if name not in (in_layer.get(layer_of(name), "") if layer_of(name) else everywhere)
        and not (_is_excluded_everywhere(name) and name.rpartition(".")[2] in lasts)
    ]


def _is_excluded_everywhere(name: str) -> bool:
    """Whether SGLang 0.5.23 excludes a name's last part in every layer, and inside of others.

    `ModelOptQuantConfig.is_layer_excluded`: a draft layer's `kv_a_proj_with_mqa` would exclude
    `fused_qkv_a_proj_with_mqa` of all layers.
    """
    return name.rpartition(".")[2] in _FIRST_PROJECTIONS


def _looked_up(linear: Linear) -> Iterator[str]:
    """Every name under which an engine looks the linear up."""
    yield from spellings(linear.name)
    yield from linear.engine_names
    container = experts_container(linear.name)
    if container is not None:
        yield from spellings(container)


def _declared(choice: Choice) -> Mapping[str, Any]:
    return form_of(Layout.MODELOPT, choice.format).declared


def _algorithm(choice: Choice) -> dict[str, Any]:
    declared = _declared(choice)
    return {"quant_algo": declared["algorithm"][choice.input]} | _group_size([choice])


def _group_size(choices: Iterable[Choice]) -> dict[str, Any]:
    """The size of blocks, where a format has blocks."""
    for choice in choices:
        if "group_size" in _declared(choice):
            return {"group_size": _declared(choice)["group_size"]}
    return {}


def _flat(
    algorithm: str,
    layers: dict[str, dict[str, Any]] | None,
    ignore: list[str],
    choices: Mapping[str, Choice],
) -> dict[str, Any]:
    config: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": algorithm}
    config["producer"] = PRODUCER
    config |= _group_size(choices.values())
    members: dict[str, list[str]] = {}
    for name, choice in choices.items():
        members.setdefault(choice.form, []).append(name)
    groups = {}
    order = sorted(members, key=lambda form: (Choice.parse(form).format.weight_bits, form))
    for number, form in enumerate(order):
        choice = Choice.parse(form)
        numbers = _declared(choice)["numbers"]
        groups[f"group_{number}"] = {
            "weights": numbers,
            "input_activations": None if choice.keeps_input else numbers,
            "targets": members[form] if layers else ["Linear"],
        }
    config["config_groups"] = groups
    if layers is not None:
        config["quantized_layers"] = layers
    return config | {"ignore": ignore}


def _nested(
    algorithm: str,
    layers: dict[str, dict[str, Any]] | None,
    ignore: list[str],
    choices: Mapping[str, Choice],
) -> dict[str, Any]:
    quantization: dict[str, Any] = {"quant_algo": algorithm} | _group_size(choices.values())
    quantization["exclude_modules"] = ignore
    if layers is not None:
        quantization["quantized_layers"] = layers
    return {"producer": PRODUCER, "quantization": quantization}


def form_of_algorithm(algorithm: str) -> str | None:
    """The form (`nvfp4`, `nvfp4/a16`, `fp8`) that a layer's algorithm stands for, or None."""
    for format in all_formats():
        form = format.layouts.get(Layout.MODELOPT)
        for input, name in form.declared["algorithm"].items() if form else ():
            if name == algorithm:
                return Choice.parse(f"{format}/{input}" if input else str(format)).form
    return None
