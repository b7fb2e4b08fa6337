"""What an engine asks of an assignment of an architecture, where it does not load any one."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autoquant.formats import BF16, FP8, NVFP4, Choice
from autoquant.plan.assignment import Assignment

Change = Callable[[Iterable[Mapping[str, Any]], Assignment], Assignment]


@dataclass(frozen=True)
class Condition:
    """What an engine asks of an assignment beyond its groups, and one that meets it."""

    said: str
    change: Change


def in_bf16(*parts: str) -> Change:
    """Groups whose name has one of the parts stay."""
    return lambda groups, assignment: assignment.replace(
        {own["name"]: BF16 for own in groups if any(part in own["name"] for part in parts)}
    )


def experts_in(choice: Choice) -> Change:
    return lambda groups, assignment: assignment.replace(
        {own["name"]: choice for own in groups if own["role"] == "experts"}
    )


def alike(groups: Iterable[Mapping[str, Any]], assignment: Assignment) -> Assignment:
    """Every layer as the first one."""
    first: dict[str, Choice] = {}
    for own in groups:
        first.setdefault(re.sub(r"layers\.\d+\.", "", own["name"]), assignment[own["name"]])
    return assignment.replace(
        {own["name"]: first[re.sub(r"layers\.\d+\.", "", own["name"])] for own in groups}
    )


CONDITIONS = {
    ("gemma2", "SGLang modelopt"): Condition("all layers are alike", alike),
    ("gemma2", "SGLang compressed-tensors"): Condition("all layers are alike", alike),
    ("falcon_h1", "SGLang modelopt"): Condition(
        "attention and Mamba stay", in_bf16("self_attn", "mamba")
    ),
    ("qwen3_next", "SGLang modelopt"): Condition("`in_proj_qkvz` stays", in_bf16("in_proj_qkvz")),
    ("qwen3_next", "SGLang compressed-tensors"): Condition(
        "`in_proj_qkvz` stays", in_bf16("in_proj_qkvz")
    ),
    **{
        (kind, "SGLang compressed-tensors"): Condition(
            "`q_a_proj` and `kv_a_proj` stay", in_bf16("qkv_a")
        )
        for kind in ("deepseek_v3", "deepseek_v32", "glm_moe_dsa")
    },
    **{
        ("deepseek_v4", f"SGLang {layout}"): Condition(
            "`wq_a` and `wkv` stay",
            in_bf16("attn.fused_wqa_wkv", "attn.wkv", "attn.wq_a", "attn.qkv_a"),
        )
        for layout in ("modelopt", "compressed-tensors")
    },
    ("glm4_moe", "SGLang compressed-tensors"): Condition(
        "experts are not in NVFP4", experts_in(FP8)
    ),
    ("kimi_linear", "vLLM compressed-tensors"): Condition(
        "a layer of experts is in NVFP4", experts_in(NVFP4)
    ),
}
"""Where an engine refuses what the table's assignments are; docs/architectures.md says why."""
