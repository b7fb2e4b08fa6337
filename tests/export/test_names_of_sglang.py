"""Declarations under the names that SGLang looks modules up by, where those are not on disk."""

import re
from collections.abc import Iterable
from typing import Any

import pytest
from exported import NVFP4_MAX, uniform
from tiny_models import save_model

from autoquant.export.declaration import quantized_linears
from autoquant.export.layouts import compressed_tensors, modelopt
from autoquant.formats import BF16, FP8
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import Groups, find_groups
from autoquant.source.source import Source, open_source


def in_modelopt(source: Source, assignment: Assignment) -> dict[str, Any]:
    groups = find_groups(source)
    linears = quantized_linears(groups, assignment)
    return modelopt.quantization_files(source.headers, groups, linears)[0]


def in_compressed_tensors(source: Source, assignment: Assignment) -> dict[str, Any]:
    groups = find_groups(source)
    linears = quantized_linears(groups, assignment)
    return compressed_tensors.quantization_config(source.headers, groups, linears)


def renamed(target: str) -> str:
    """As `hf_to_sglang_mapper` of SGLang's Qwen3-VL spells what a checkpoint declares."""
    spelled = target.replace("attn.qkv", "attn.qkv_proj", 1)
    for ours, theirs in (
        ("model.language_model.", "language_model.model."),
        ("model.visual.", "visual."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", "language_model.model."),
    ):
        if spelled.startswith(ours):
            return spelled.replace(ours, theirs, 1)
    return spelled


def finds(targets: Iterable[str], module: str) -> bool:
    """Whether SGLang's `_find_first_match` finds a module among targets."""
    expressions = [target[3:] for target in targets if target.startswith("re:")]
    return module in targets or any(re.match(own, module) for own in expressions)


def forms(config: dict[str, Any], module: str) -> set[str]:
    """What SGLang's Qwen3-VL takes a module for."""
    groups = {own["format"]: own["targets"] for own in config["config_groups"].values()}
    groups["bf16"] = config["ignore"]
    return {form for form, own in groups.items() if finds([renamed(name) for name in own], module)}


@pytest.mark.parametrize("experts", [NVFP4_MAX, FP8, BF16], ids=str)
def test_text_tower_of_qwen3_vl_is_found_under_the_names_that_nothing_renames(experts, tmp_path):
    source = open_source(save_model("qwen3_vl_moe", tmp_path))
    layer = "model.language_model.layers.1"
    own = {f"{layer}.mlp.experts": experts, f"{layer}.self_attn.qkv": NVFP4_MAX}
    kept = {f"{layer}.self_attn.o_proj": BF16}
    config = in_compressed_tensors(source, uniform(find_groups(source), FP8).replace(own | kept))
    fp8, nvfp4 = "float-quantized", "nvfp4-pack-quantized"
    assert forms(config, f"{layer}.self_attn.qkv_proj") == {nvfp4}
    assert forms(config, f"{layer}.self_attn.o_proj") == {"bf16"}
    assert forms(config, "model.language_model.layers.0.self_attn.o_proj") == {fp8}
    expected = {NVFP4_MAX: nvfp4, FP8: fp8, BF16: "bf16"}[experts]
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert forms(config, f"{layer}.mlp.experts.0.{part}") == {expected}
        assert forms(config, f"model.language_model.layers.0.mlp.experts.0.{part}") == {fp8}


def test_gemma_2_is_declared_without_layers_where_all_of_them_agree(tmp_path):
    source = open_source(save_model("gemma2", tmp_path))
    first, second = (f"model.layers.{index}" for index in range(2))
    kept = {
        f"{layer}.{name}": BF16
        for layer in (first, second)
        for name in ("mlp.gate_up", "self_attn.o_proj")
    }
    mixed = {f"{first}.mlp.down_proj": NVFP4_MAX}
    assignment = uniform(find_groups(source), FP8).replace(kept | mixed)
    layers = in_modelopt(source, assignment)["quantized_layers"]
    assert layers["self_attn.qkv_proj"] == {"quant_algo": "FP8"}
    assert not {"self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"} & layers.keys()

    config = in_compressed_tensors(source, assignment)
    targets = [name for own in config["config_groups"].values() for name in own["targets"]]
    assert "self_attn.qkv_proj" in targets
    for name in ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert finds(config["ignore"], name), "SGLang asks for the parts of what it joins"
    assert not any(finds(names, "mlp.down_proj") for names in (targets, config["ignore"]))


@pytest.mark.parametrize("choice", [FP8, BF16], ids=str)
def test_shared_experts_of_kimi_linear_are_declared_without_a_layer(choice, tmp_path):
    source = open_source(save_model("kimi_linear", tmp_path))
    groups = find_groups(source)
    with_routed = {group.name: choice for group in groups if group.role == "experts"}
    assignment = uniform(groups, NVFP4_MAX).replace(with_routed)
    flat, config = in_modelopt(source, assignment), in_compressed_tensors(source, assignment)
    fp8 = [own["targets"] for own in config["config_groups"].values() if choice == FP8][:1]
    for name in ("gate_up_proj", "down_proj"):
        assert flat["quantized_layers"].get(name) == ({"quant_algo": "FP8"} if fp8 else None)
        assert name not in [*flat["ignore"], *config["ignore"]], "part of other modules' names"
        assert all(name in targets for targets in fp8)
        assert finds(config["ignore"], name) == (choice == BF16)


def test_feed_forward_of_falcon_h1_is_declared_as_mlp(tmp_path):
    source = open_source(save_model("falcon_h1", tmp_path))
    layers = in_modelopt(source, uniform(find_groups(source), NVFP4_MAX).replace({}))
    declared = layers.get("quantized_layers")
    assert declared is None, "one format for all needs no names"
    first = {"model.layers.0.feed_forward.down_proj": FP8}
    layers = in_modelopt(source, uniform(find_groups(source), NVFP4_MAX).replace(first))
    named = layers["quantized_layers"]
    assert named["model.layers.0.mlp.down_proj"] == {"quant_algo": "FP8"}
    assert named["model.layers.1.mlp.gate_up_proj"]["quant_algo"] == "NVFP4"


def test_first_projections_of_deepseek_are_declared_as_sglang_joins_them(tmp_path):
    source = open_source(save_model("deepseek_v3", tmp_path))
    groups = find_groups(source)
    kept = {"model.layers.1.self_attn.qkv_a": BF16, "model.layers.0.self_attn.o_proj": FP8}
    flat = in_modelopt(source, uniform(groups, NVFP4_MAX).replace(kept))
    joined = "self_attn.fused_qkv_a_proj_with_mqa"
    assert flat["quantized_layers"][f"model.layers.0.{joined}"]["quant_algo"] == "NVFP4"
    assert f"model.layers.1.{joined}" in flat["ignore"]
    excluded = {name.rpartition(".")[2] for name in flat["ignore"]}
    assert "kv_b_proj" in excluded
    anywhere = {"q_a_proj", "kv_a_proj_with_mqa"}
    assert not anywhere & excluded, "SGLang would exclude them in every layer"
    config = in_compressed_tensors(source, uniform(groups, NVFP4_MAX).replace(kept))
    assert anywhere < {name.rpartition(".")[2] for name in config["ignore"]}


def test_the_expression_for_a_text_tower_does_not_depend_on_how_its_experts_are_grouped(tmp_path):
    """A search may group shared experts with the routed ones; who reads it back does not."""
    source = open_source(save_model("qwen3_vl_moe", tmp_path))
    both = [find_groups(source, shared_experts=how) for how in ("with_routed", "separate")]
    turned = Groups(groups=both[1].groups[::-1], fixed=both[1].fixed[::-1])
    found: list[set[str]] = []
    for groups in (*both, turned):
        linears = quantized_linears(groups, uniform(groups, FP8))
        config = compressed_tensors.quantization_config(source.headers, groups, linears)
        (own,) = config["config_groups"].values()
        found.append({name for name in (*own["targets"], *config["ignore"]) if name[:3] == "re:"})
    assert found[0] == found[1] == found[2]
