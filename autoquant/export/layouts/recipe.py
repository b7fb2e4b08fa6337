"""An assignment as a ModelOpt recipe, from which quantization-aware training can start.

`modelopt.recipe.load_recipe(FILE).quantize` is the configuration that `mtq.quantize` takes. Its
entries name quantizers by module, later ones over earlier ones; none is meant for more than the
linears of one name, but for experts, whose quantizers are called otherwise where they are fused.

Scale rules are left out: one calibration algorithm holds for the whole model there, and block
scales follow the weights once these are trained.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from autoquant.export.layouts.modules import experts_container, spellings
from autoquant.formats import NVFP4_BLOCK, Format
from autoquant.plan.kv_cache import KvCache

_IN_MEMORY = (
    ("backbone.", "model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model.language_model."),
)
"""How transformers renames the start of some names while it loads a checkpoint."""


def modelopt_recipe(formats: Mapping[str, Format], kv_cache: KvCache) -> dict[str, Any]:
    """The recipe as YAML types.

    Args:
        formats: format of every quantized linear, by its name on disk.
        kv_cache: what keys and values are rounded to.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, format in _patterns(formats).items():
        entries.append({"quantizer_name": name, "cfg": _quantizer(format)})
    if kv_cache is KvCache.FP8:
        entries.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": _quantizer(Format.FP8)})
    return {
        "metadata": {
            "recipe_type": "ptq",
            "description": "Formats that AutoQuant chose, layer by layer, with ModelOpt's own "
            "calibration of scales.",
        },
        "quantize": {"algorithm": "max", "quant_cfg": entries},
    }


def _quantizer(format: Format) -> dict[str, Any]:
    """Attributes of a quantizer: exponent and mantissa bits, and what a scale is shared by."""
    if format is Format.FP8:
        return {"num_bits": [4, 3], "axis": None}
    blocks = {-1: NVFP4_BLOCK, "type": "dynamic", "scale_bits": [4, 3]}
    return {"num_bits": [2, 1], "block_sizes": blocks, "effective_bits": 4.5}


def _patterns(formats: Mapping[str, Format]) -> dict[str, Format]:
    """Formats by quantizer name, under every name that a module can have in memory."""
    found = {}
    for linear, format in formats.items():
        container = experts_container(linear)
        for name in _names(container or linear):
            for tensor in ("weight", "input"):
                end = f".*{tensor}_quantizer*" if container else f".{tensor}_quantizer"
                found[name + end] = format
    return found


def _names(module: str) -> Iterator[str]:
    for name in spellings(module):
        yield name
        for disk, memory in _IN_MEMORY:
            if name.startswith(disk):
                yield memory + name.removeprefix(disk)
