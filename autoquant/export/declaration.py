"""What a checkpoint's JSON files tell engines about its quantization, in either layout."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoquant.errors import ConfigError
from autoquant.export.layouts import compressed_tensors as layout_compressed_tensors
from autoquant.export.layouts import modelopt as layout_modelopt
from autoquant.export.layouts.base import Layout
from autoquant.formats import BF16, Choice
from autoquant.formats.kv_cache import KvCache
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import Groups
from autoquant.source.headers import Headers


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """The content of the JSON files."""

    config: dict[str, Any]
    """`quantization_config` of config.json."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Files of their own, by name."""


def quantized_linears(groups: Groups, assignment: Assignment) -> dict[str, Choice]:
    """Choice of every linear that leaves BF16, by its name on disk."""
    return {
        linear.name: assignment[group.name]
        for group in groups
        for linear in group.linears
        if assignment[group.name] != BF16
    }


def caveat(layout: Layout, groups: Groups, choices: Mapping[str, Choice]) -> str | None:
    """What a reader of the layout does wrong with such a checkpoint, or None."""
    if layout is Layout.COMPRESSED_TENSORS:
        return layout_compressed_tensors.transformers_caveat(groups, choices)
    return None


def reader_warnings(layout: Layout, groups: Groups, assignment: Assignment) -> tuple[str, ...]:
    """What to tell who makes such a checkpoint."""
    found = caveat(layout, groups, quantized_linears(groups, assignment))
    if found is None:
        return ()
    return (
        f"{found}. vLLM and SGLang read them right, and `autoquant score MODEL --checkpoint DIR` "
        "runs them without an engine.",
    )


def declare(
    layout: Layout,
    headers: Headers,
    groups: Groups,
    choices: Mapping[str, Choice],
    kv_cache: KvCache,
) -> Declaration | None:
    """What `layout` says about a checkpoint; None where nothing is quantized.

    Args:
        layout: whose files.
        headers: the source's tensors.
        groups: its layer groups.
        choices: of every quantized linear by name.
        kv_cache: what the engines' cache is to hold.

    Raises:
        ConfigError: an FP8 cache beside weights that all stay as they are.
    """
    if not choices and kv_cache.is_quantized:
        raise ConfigError(
            "an FP8 cache of keys and values is declared with the layers' quantization, and the "
            "assignment quantizes no layer.",
            fix="leave out --kv-cache: engines quantize the cache of a BF16 model on request.",
        )
    if not choices:
        return None
    fp8_kv_cache = kv_cache.is_quantized
    if layout is Layout.COMPRESSED_TENSORS:
        return Declaration(
            config=layout_compressed_tensors.quantization_config(
                headers, groups, choices, fp8_kv_cache=fp8_kv_cache
            )
        )
    flat, nested = layout_modelopt.quantization_files(
        headers, groups, choices, fp8_kv_cache=fp8_kv_cache
    )
    return Declaration(config=flat, files={layout_modelopt.QUANTIZATION_FILE: nested})


def exported_config(source: Mapping[str, Any], declared: Declaration | None) -> dict[str, Any]:
    """config.json of a checkpoint whose source has the config `source`.

    A quantized model computes in BF16, whatever its source did.
    """
    config = copy.deepcopy(dict(source))
    if declared is None:
        return config
    for part in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and key in part:
                part[key] = "bfloat16"
    if not {"dtype", "torch_dtype"} & config.keys():
        config["torch_dtype"] = "bfloat16"
    return config | {"quantization_config": declared.config}
