"""An assignment as a ModelOpt recipe, from which quantization-aware training can start.

`modelopt.recipe.load_recipe(FILE).quantize` is the configuration that `mtq.quantize` takes. Its
entries name quantizers by module, later ones over earlier ones; none is meant for more than the
linears of one name, but for experts, whose quantizers are called otherwise where they are fused.

Codes are left out, and the recipe says so: one calibration algorithm holds for the whole model
there, and codes and block scales follow the weights once these are trained.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from autoquant.export.layouts.base import Layout, form_of
from autoquant.export.layouts.modules import experts_container, spellings
from autoquant.formats import FP8, NEAREST, Choice, Format, ScaleRule
from autoquant.formats.kv_cache import KvCache

_IN_MEMORY = (
    ("backbone.", "model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model.language_model."),
)
"""How transformers renames the start of some names while it loads a checkpoint."""

_LOST = (
    " A recipe cannot carry codes: the scale rules and roundings of the assignment are lost, and "
    "ModelOpt rounds to the nearest under max scales. AutoQuant's own export keeps them."
)


def modelopt_recipe(choices: Mapping[str, Choice], kv_cache: KvCache) -> dict[str, Any]:
    """The recipe as YAML types.

    Args:
        choices: of every quantized linear, by its name on disk.
        kv_cache: what keys and values are rounded to.
    """
    lost = _LOST if any(map(_has_own_codes, choices.values())) else ""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, format in _patterns(choices).items():
        entries.append({"quantizer_name": name, "cfg": _quantizer(format)})
    if kv_cache.is_quantized:
        entries.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": _quantizer(FP8.format)})
    return {
        "metadata": {
            "recipe_type": "ptq",
            "description": "Formats that AutoQuant chose, layer by layer, with ModelOpt's own "
            f"calibration of scales.{lost}",
        },
        "quantize": {"algorithm": "max", "quant_cfg": entries},
    }


def _has_own_codes(choice: Choice) -> bool:
    """Whether ModelOpt's calibration would choose other codes."""
    return choice.scale_rule not in (None, ScaleRule.MAX) or choice.rounding != NEAREST


def _quantizer(format: Format) -> dict[str, Any]:
    """Attributes of a quantizer: exponent and mantissa bits, and what a scale is shared by."""
    quantizer: dict[str, Any] = form_of(Layout.MODELOPT, format).declared["quantizer"]
    return copy.deepcopy(quantizer)


def _patterns(choices: Mapping[str, Choice]) -> dict[str, Format]:
    """Formats by quantizer name, under every name that a module can have in memory."""
    found = {}
    for linear, choice in choices.items():
        container = experts_container(linear)
        for name in _names(container or linear):
            for tensor in ("weight",) if choice.keeps_input else ("weight", "input"):
                end = f".*{tensor}_quantizer*" if container else f".{tensor}_quantizer"
                found[name + end] = choice.format
    return found


def _names(module: str) -> Iterator[str]:
    for name in spellings(module):
        yield name
        for disk, memory in _IN_MEMORY:
            if name.startswith(disk):
                yield memory + name.removeprefix(disk)
