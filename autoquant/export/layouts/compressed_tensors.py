"""The compressed-tensors layout: `quantization_config` of config.json, and NVFP4's reciprocals.

Format: https://github.com/vllm-project/compressed-tensors. One group per format, FP8 first, because
transformers takes the first group for that of the experts. Modules are targeted by exact name;
engines that know the experts of a checkpoint under other names find them by an expression.
"""

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

import autoquant_kernels as kernels
import torch
from torch import Tensor

from autoquant.export.layouts.base import Layout, form_of
from autoquant.export.layouts.modules import (
    disputed_names,
    experts_container,
    layer_of,
    spellings,
    unquantized_modules,
)
from autoquant.formats import A16, FP8, NVFP4, Choice, ScaleRule, all_formats
from autoquant.plan.grouping import Groups
from autoquant.plan.linears import Linear
from autoquant.source import names as table
from autoquant.source.headers import Headers

METHOD = "compressed-tensors"
VERSION = "0.20.0"
"""Of the library whose layout this is."""

ANY_LINEAR = "Linear"
EXPRESSION = "re:"
MIXED = "mixed-precision"
_ENGINES_PARTS = frozenset({"gate_proj", "up_proj", "down_proj"})
"""Parts of an expert that SGLang looks up, whatever the checkpoint calls them, and vLLM too where
an expert has no gate."""

_TEXT_TOWER = "model.language_model."

KV_CACHE_SCHEME = form_of(Layout.COMPRESSED_TENSORS, FP8.format).declared["weights"]


def quantization_config(
    headers: Headers, groups: Groups, choices: Mapping[str, Choice], *, fp8_kv_cache: bool = False
) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        headers: the source's tensors.
        groups: its layer groups.
        choices: of every quantized linear by name; at least one.
        fp8_kv_cache: whether the checkpoint holds scales of an FP8 cache.
    """
    members: dict[str, list[Linear]] = {}
    for linear in groups.linears:
        if linear.name in choices:
            members.setdefault(choices[linear.name].form, []).append(linear)
    disputed = disputed_names(groups, choices)
    used = sorted(
        map(Choice.parse, members), key=lambda choice: (-choice.format.weight_bits, choice.form)
    )
    config_groups = {
        f"group_{number}": _group(choice, _targets(members[choice.form], disputed))
        for number, choice in enumerate(used)
    }
    packings = {_declared(choice)["format"] for choice in used}
    return {
        "quant_method": METHOD,
        "format": packings.pop() if len(packings) == 1 else MIXED,
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": config_groups,
        "ignore": _ignored(headers, groups, choices),
        "kv_cache_scheme": KV_CACHE_SCHEME if fp8_kv_cache else None,
    }


def scale_of(reciprocal: Tensor) -> Tensor:
    """The NVFP4 scalar whose float32 reciprocal is stored, 0-dimensional float32.

    Several scales can have one reciprocal. Scales are BF16 magnitudes over a constant, and such a
    one is taken where there is one, so that what was exported is what is read.
    """
    stored = reciprocal.reshape(())
    plain = 1 / stored
    if not 0 < plain < float("inf"):
        return plain
    for rule in (ScaleRule.MAX, ScaleRule.FOUR_OVER_SIX):
        step = kernels.nvfp4_global_scale(1.0, rule)
        amax = (plain / step).to(torch.bfloat16).float()
        if 0 < amax < float("inf"):
            scale = kernels.nvfp4_global_scale(amax.item(), rule)
            if 1 / scale == stored:
                return scale
    return plain


def _declared(choice: Choice) -> Mapping[str, Any]:
    return form_of(Layout.COMPRESSED_TENSORS, choice.format).declared


def _group(choice: Choice, targets: list[str]) -> dict[str, Any]:
    declared = _declared(choice)
    inputs = None if choice.keeps_input else declared["weights"] | declared["input_activations"]
    return {
        "format": declared["format"],
        "targets": targets,
        "weights": declared["weights"],
        "input_activations": inputs,
        "output_activations": None,
    }


def form_of_group(group: Mapping[str, Any]) -> str:
    """The form (`nvfp4`, `nvfp4/a16`, `fp8`) that a group of the file declares.

    Raises:
        KeyError: no format has such weights.
    """
    bits = group["weights"]["num_bits"]
    for format in all_formats():
        form = format.layouts.get(Layout.COMPRESSED_TENSORS)
        if form is not None and form.declared["weights"]["num_bits"] == bits:
            is_plain = group["input_activations"] is None and format.quantizes_input
            return f"{format}/{A16}" if is_plain else str(format)
    raise KeyError(f"weights of {bits} bits")


def _ignored(headers: Headers, groups: Groups, choices: Mapping[str, Choice]) -> list[str]:
    """What stays as it is, under all of its names.

    SGLang takes a name for that of every module whose name ends with it. An expression is for a
    name that has no layer of its own.
    """
    named = [*unquantized_modules(headers, groups, choices), *_first_experts(groups, choices)]
    engines = {name for linear in groups.linears for name in linear.engine_names}
    without_layer = [name for name in named if name in engines and not layer_of(name)]
    return [
        *(name for name in named if name not in without_layer),
        *(f"{EXPRESSION}{re.escape(name)}$" for name in without_layer),
        *_in_text_tower(named),
    ]


def _in_text_tower(names: Iterable[str]) -> list[str]:
    """An expression for the names that begin as those of a text tower do.

    SGLang's Qwen3-VL renames them in what it reads, and looks up the names from before. Sorted:
    who reads the checkpoint back may list its linears in another order.
    """
    inside = {name for name in names if name.startswith(_TEXT_TOWER) and _is_asked_for(name)}
    return [f"{EXPRESSION}({'|'.join(map(re.escape, sorted(inside)))})$"] if inside else []


def _is_asked_for(name: str) -> bool:
    """Whether engines look a name up: of experts, those of the first."""
    expert = table.ROUTED_EXPERT.fullmatch(name)
    return expert is None or expert["index"] == "0"


def _targets(linears: Iterable[Linear], disputed: Container[str]) -> list[str]:
    """Every linear under all of its names, and experts as engines may look for them.

    Never the class of all linears: engines rename modules of vision towers, and would not find
    them among those to ignore.
    Engines spell a name as their own modules are called before they look it up, but no expression.
    """
    targets: dict[str, None] = {}
    parts: dict[str, set[str]] = {}
    for linear in linears:
        others = (name for name in linear.engine_names if name not in disputed)
        targets |= dict.fromkeys((*spellings(linear.name), *others))
        expert = table.ROUTED_EXPERT.fullmatch(linear.name)
        if expert:
            parts.setdefault(expert["container"], set()).add(expert["part"])
    for container in [c for c, own in parts.items() if _are_renamed(c, own)]:
        expression = "|".join(map(re.escape, _containers(container)))
        targets[rf"{EXPRESSION}({expression})\.\d+\.\w+$"] = None
    return [*targets, *_in_text_tower(targets)]


def _first_experts(groups: Groups, choices: Mapping[str, Choice]) -> list[str]:
    """Parts of the first expert of every layer whose experts stay, by the names that SGLang asks.

    It takes their answer for that of all experts of the layer.
    """
    parts: dict[str, set[str]] = {}
    for tensor in groups.fixed:
        stack = table.FUSED_EXPERTS.fullmatch(tensor.name)
        if stack and tensor.reason is table.Fixed.FUSED_EXPERTS:
            parts[stack["container"]] = {stack["product"]}
    for linear in groups.linears:
        expert = table.ROUTED_EXPERT.fullmatch(linear.name)
        if expert and linear.name not in choices:
            parts.setdefault(expert["container"], set()).add(expert["part"])
    return [
        f"{name}.0.{part}"
        for container, own in parts.items()
        if _are_renamed(container, own)
        for name in _containers(container)
        for part in sorted(_ENGINES_PARTS)
    ]


def _are_renamed(container: str, parts: set[str]) -> bool:
    """Whether engines call experts, or their parts, otherwise than the checkpoint does."""
    is_inside = container.startswith(_TEXT_TOWER)
    return parts != _ENGINES_PARTS or _are_in_layer(container) or is_inside


def _are_in_layer(container: str) -> bool:
    return container == f"{layer_of(container)}.experts"


def _containers(name: str) -> dict[str, None]:
    """A container of experts as engines may call it.

    SGLang's Mixtral begins with `layers`, and its Gemma 4 has `moe` between layer and experts.
    """
    other = re.sub(r"^backbone\.", "model.", name)
    ways = [name, other, other.removeprefix("model.")]
    if _are_in_layer(name):
        ways.append(name.replace(".experts", ".moe.experts"))
    return dict.fromkeys(spelled for own in ways for spelled in spellings(own))


def transformers_caveat(groups: Groups, choices: Mapping[str, Choice]) -> str | None:
    """What transformers does wrong with the checkpoint in this layout, or None.

    It takes one scheme for all experts of a model: that of the first group of the file.
    """
    routed = [linear.name for linear in groups.linears if experts_container(linear.name)]
    used = {choices[name].format for name in routed if name in choices}
    if NVFP4.format in used:
        return (
            "transformers 5 drops the global scale of NVFP4 experts while it loads them, and "
            "computes with wrong weights without a word"
        )
    if routed and all(choice.format != FP8.format for choice in choices.values()):
        return (
            "transformers 5 takes the experts for NVFP4 like the rest, and fails to load them, "
            "where no layer is FP8"
        )
    return None
