"""The compressed-tensors layout: `quantization_config` of config.json, and NVFP4's reciprocals.

Format: https://github.com/vllm-project/compressed-tensors. One group per format, FP8 first, because
transformers takes the first group for that of the experts. Modules are targeted by exact name;
engines that know the experts of a checkpoint under other names find them by an expression.
"""

import re
from collections.abc import Mapping
from typing import Any

import autoquant_kernels as kernels
import torch
from torch import Tensor

from autoquant.export.layouts.modules import (
    experts_container,
    spellings,
    unquantized_modules,
)
from autoquant.formats import NVFP4_BLOCK, Format, ScaleRule
from autoquant.plan.grouping import Groups
from autoquant.source import names as table
from autoquant.source.headers import Headers

METHOD = "compressed-tensors"
VERSION = "0.20.0"
"""Of the library whose layout this is."""

ANY_LINEAR = "Linear"
EXPRESSION = "re:"
MIXED = "mixed-precision"
_ORDER = (Format.FP8, Format.NVFP4)
_FORMATS = {Format.FP8: "float-quantized", Format.NVFP4: "nvfp4-pack-quantized"}
_ENGINES_PARTS = frozenset({"gate_proj", "up_proj", "down_proj"})
"""Parts of an expert that SGLang looks up, whatever the checkpoint calls them, and vLLM too where
an expert has no gate."""

_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
_NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": NVFP4_BLOCK,
    "symmetric": True,
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
}


def quantization_config(
    headers: Headers, groups: Groups, formats: Mapping[str, Format], *, fp8_kv_cache: bool = False
) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        headers: the source's tensors.
        groups: its layer groups.
        formats: format of every quantized linear by name; at least one.
        fp8_kv_cache: whether the checkpoint holds scales of an FP8 cache.
    """
    used = [format for format in _ORDER if format in formats.values()]
    is_mixed = len(used) > 1
    config_groups = {}
    for number, format in enumerate(used):
        own = [name for name, other in formats.items() if other is format]
        config_groups[f"group_{number}"] = _group(format, _targets(own))
    return {
        "quant_method": METHOD,
        "format": MIXED if is_mixed else _FORMATS[used[0]],
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": config_groups,
        "ignore": unquantized_modules(headers, groups, formats),
        "kv_cache_scheme": _FP8 if fp8_kv_cache else None,
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


def _group(format: Format, targets: list[str]) -> dict[str, Any]:
    weights = _FP8 if format is Format.FP8 else _NVFP4
    inputs = weights if format is Format.FP8 else weights | {"dynamic": "local"}
    return {
        "format": _FORMATS[format],
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def _targets(names: list[str]) -> list[str]:
    """Every linear under all of its names, and experts as engines may look for them.

    Never the class of all linears: engines rename modules of vision towers, and would not find
    them among those to ignore.
    Engines spell a name as their own modules are called before they look it up, but no expression.
    """
    targets: dict[str, None] = {}
    parts: dict[str, set[str]] = {}
    for name in names:
        targets |= dict.fromkeys(spellings(name))
        expert = table.ROUTED_EXPERT.fullmatch(name)
        if expert:
            parts.setdefault(expert["container"], set()).add(expert["part"])
    for container in [c for c, own in parts.items() if own != _ENGINES_PARTS]:
        other = re.sub(r"^backbone\.", "model.", container)
        containers = dict.fromkeys((*spellings(container), *spellings(other)))
        expression = "|".join(map(re.escape, containers))
        targets[rf"{EXPRESSION}({expression})\.\d+\.\w+$"] = None
    return list(targets)


def transformers_caveat(groups: Groups, formats: Mapping[str, Format]) -> str | None:
    """What transformers does wrong with the checkpoint in this layout, or None.

    It takes one scheme for all experts of a model: that of the first group of the file.
    """
    routed = [linear.name for linear in groups.linears if experts_container(linear.name)]
    if Format.NVFP4 in map(formats.get, routed):
        return (
            "transformers 5 drops the global scale of NVFP4 experts while it loads them, and "
            "computes with wrong weights without a word"
        )
    if routed and Format.FP8 not in formats.values():
        return (
            "transformers 5 takes the experts for NVFP4 like the rest, and fails to load them, "
            "where no layer is FP8"
        )
    return None
