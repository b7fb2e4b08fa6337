"""The two JSON files: what each engine looks for, and the traps of their look-ups."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from exported import NVFP4_MAX, export_mixed, mixed, uniform
from tiny_models import MODELS, save_model

import autoquant
from autoquant.export.declaration import quantized_linears
from autoquant.export.layouts.engine_view import modelopt_views
from autoquant.export.layouts.modelopt import quantization_files
from autoquant.formats import BF16, FP8, NVFP4
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import Groups, engine_names, find_groups, group_tensors
from autoquant.source.headers import Headers, TensorHeader
from autoquant.source.source import Source, open_source


def files_of(source: Source, assignment: Assignment) -> tuple[dict[str, Any], dict[str, Any]]:
    groups = find_groups(source)
    return quantization_files(source.headers, groups, quantized_linears(groups, assignment))


def names_of(groups: Groups) -> dict[str, tuple[str, ...]]:
    return {own.name: own.engine_names for own in groups.linears if own.engine_names}


@pytest.fixture
def dense(tmp_path) -> Source:
    return open_source(save_model("llama", tmp_path / "source"))


@pytest.fixture
def sparse(tmp_path) -> Source:
    return open_source(save_model("minimax_m2", tmp_path / "source"))


def test_both_files_are_written_and_agree(dense, tmp_path):
    export_mixed(dense, tmp_path / "out")
    flat = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    nested = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    view, other = modelopt_views(flat, nested, names_of(find_groups(dense)))
    assert view == other
    assert flat["quant_method"] == flat["producer"]["name"] == nested["producer"]["name"]
    assert flat["quant_method"] == "modelopt"
    assert flat["producer"] == nested["producer"]
    assert nested["producer"]["autoquant"] == autoquant.__version__
    assert flat["kv_cache_scheme"] is None
    assert nested["quantization"]["kv_cache_quant_algo"] is None
    assert nested["quantization"]["group_size"] == 16


@pytest.mark.parametrize("kind", MODELS)
def test_every_linear_has_its_format_in_the_engines_eyes(kind, tmp_path):
    source = open_source(save_model(kind, tmp_path))
    groups = find_groups(source)
    assignment = mixed(groups)
    flat, nested = files_of(source, assignment)
    for view in modelopt_views(flat, nested, names_of(groups)):
        for group in groups:
            for linear in group.linears:
                assert view.form(linear.name) == assignment[group.name].form


def test_mixed_file_names_every_matrix_once_on_either_side(dense):
    groups = find_groups(dense)
    assignment = mixed(groups)
    flat, _ = files_of(dense, assignment)
    assert flat["quant_algo"] == "MIXED_PRECISION"
    expected = {
        linear.name: {"quant_algo": "NVFP4", "group_size": 16}
        if assignment[group.name].format is NVFP4.format
        else {"quant_algo": "FP8"}
        for group in groups
        for linear in group.linears
        if assignment[group.name] != BF16
    }
    joined = {
        name: expected[linear.name]
        for linear in groups.linears
        for name in linear.engine_names
        if linear.name in expected
    }
    assert len(joined) > 1
    assert flat["quantized_layers"] == expected | joined
    names = {name for own in groups.linears for name in (own.name, *own.engine_names)}
    plain = names - expected.keys() - joined.keys()
    assert plain | {"model.embed_tokens"} == set(flat["ignore"]) - {"lm_head"} | (
        plain & {"lm_head"}
    )
    targets = [name for group in flat["config_groups"].values() for name in group["targets"]]
    assert sorted(targets) == sorted(expected)
    bits = {name: group["weights"]["num_bits"] for name, group in flat["config_groups"].items()}
    assert bits == {"group_0": 4, "group_1": 8}


@pytest.mark.parametrize(("choice", "algorithm"), [(NVFP4_MAX, "NVFP4"), (FP8, "FP8")])
def test_one_format_beside_bf16_is_a_uniform_checkpoint(dense, choice, algorithm):
    assignment = uniform(find_groups(dense), choice)
    flat, nested = files_of(dense, assignment.replace({"model.layers.0.self_attn.qkv": BF16}))
    assert flat["quant_algo"] == nested["quantization"]["quant_algo"] == algorithm
    assert "quantized_layers" not in flat
    assert "quantized_layers" not in nested["quantization"]
    assert ("group_size" in nested["quantization"]) == (algorithm == "NVFP4")
    attention = {f"model.layers.0.self_attn.{part}_proj" for part in ("q", "k", "v", "qkv")}
    assert attention | {"lm_head", "model.embed_tokens"} == set(flat["ignore"])
    assert flat["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_tied_head_that_is_not_on_disk_is_excluded(tmp_path):
    source = open_source(save_model("qwen3", tmp_path))
    flat, _ = files_of(source, uniform(find_groups(source), FP8))
    assert "lm_head" in flat["ignore"]


def test_quantized_head_is_listed_and_not_excluded(dense):
    flat, _ = files_of(dense, mixed(find_groups(dense)).replace({"lm_head": FP8}))
    assert flat["quantized_layers"]["lm_head"] == {"quant_algo": "FP8"}
    assert "lm_head" not in flat["ignore"]


def test_quantized_head_of_a_language_model_in_another_is_not_excluded_as_the_engines_own(tmp_path):
    source = open_source(save_model("minimax_m3_vl", tmp_path))
    head = Assignment.of({"language_model.lm_head": FP8})
    flat, _ = files_of(source, head)
    assert flat["quant_algo"] == "FP8"
    assert "lm_head" not in flat["ignore"]
    plain, _ = files_of(source, Assignment.of({"language_model.model.layers.0.self_attn.qkv": FP8}))
    assert {"lm_head", "language_model.lm_head"} < set(plain["ignore"])


def test_experts_are_found_under_both_spellings_of_their_container(sparse):
    flat, _ = files_of(
        sparse,
        mixed(find_groups(sparse)).replace(
            {
                "model.layers.0.block_sparse_moe.experts": NVFP4_MAX,
                "model.layers.1.block_sparse_moe.experts": BF16,
                "model.layers.1.self_attn.qkv": FP8,
            }
        ),
    )
    for spelling in ("block_sparse_moe", "mlp"):
        assert flat["quantized_layers"][f"model.layers.0.{spelling}.experts"] == {
            "quant_algo": "NVFP4",
            "group_size": 16,
        }
        assert f"model.layers.1.{spelling}.experts" in flat["ignore"]
        assert f"model.layers.0.{spelling}.experts" not in flat["ignore"]
        assert f"model.layers.0.{spelling}.gate" in flat["ignore"]
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in flat["ignore"]
    assert "model.layers.0.block_sparse_moe.experts.3.w2" in flat["quantized_layers"]


def test_bf16_experts_beside_a_quantized_shared_expert_are_excluded(tmp_path):
    source = open_source(save_model("deepseek_v3", tmp_path))
    groups = find_groups(source, shared_experts="separate")
    assignment = Assignment.of({"model.layers.1.mlp.shared_experts.gate_up": FP8})
    flat, _ = quantization_files(source.headers, groups, quantized_linears(groups, assignment))
    assert "model.layers.1.mlp.experts" in flat["ignore"]


def block(*linears: str, **config: Any) -> tuple[Headers, Groups]:
    """One layer of these linears, [16, 16] each."""
    names = [f"model.layers.0.{linear}.weight" for linear in linears]
    tensors = {
        name: TensorHeader(
            name=name, dtype="BF16", shape=(16, 16), file=Path("x"), begin=0, end=512
        )
        for name in names
    }
    return Headers(tensors=tensors, metadata={}), group_tensors(tensors, config, config)


@pytest.mark.parametrize(
    ("parts", "config"),
    [
        (("gate_proj", "up_proj"), {}),
        (("c_fc_0", "c_fc_1"), {"architectures": ["ExaoneForCausalLM"]}),
    ],
)
def test_no_excluded_name_is_part_of_what_an_engine_calls_a_quantized_one(parts, config):
    """vLLM excludes `mlp.gate_up_proj` where `mlp.gate` is excluded."""
    linears = [f"mlp.{name}" for name in ("gate", *parts, "down_proj")]
    headers, groups = block(*linears, **config)
    name = next(group.name for group in groups if len(group.linears) == 2)
    assignment = Assignment.of({name: NVFP4_MAX})
    made = quantization_files(headers, groups, quantized_linears(groups, assignment))
    flat, _ = made
    assert flat["quant_algo"] == "MIXED_PRECISION"
    assert flat["ignore"] == ["model.layers.0.mlp.down_proj", "lm_head"]
    view, _ = modelopt_views(*made, names_of(groups))
    assert view.form(f"model.layers.0.mlp.{parts[0]}") == NVFP4.form


def test_a_matrix_is_excluded_with_any_linear_that_an_engine_joins_in_it():
    parts = ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj")
    headers, groups = block(
        *(f"self_attn.{part}" for part in parts), architectures=["KimiLinearForCausalLM"]
    )
    (group,) = groups
    assignment = Assignment.of({group.name: FP8})
    flat, nested = quantization_files(headers, groups, quantized_linears(groups, assignment))
    names = names_of(groups)
    joined = "model.layers.0.self_attn.in_proj_qkvgfab"
    assert all(joined in own for own in names.values())
    assert engine_names(names, {"architectures": ["KimiLinearForCausalLM"]}, {}) == names
    assert modelopt_views(flat, nested, names)[0].form(group.linears[0].name) == FP8.form
    flat["ignore"].append("model.layers.0.self_attn.b_proj")
    view, _ = modelopt_views(flat, nested, names)
    assert {view.form(linear.name) for linear in group.linears} == {BF16.form}


def test_falcon_h1_is_declared_under_the_names_that_vllm_looks_up(tmp_path):
    """They lack the module of attention, and state-space branches stand behind all blocks."""
    source = open_source(save_model("falcon_h1", tmp_path))
    groups = find_groups(source)
    first, second = (f"model.layers.{index}" for index in range(2))
    everywhere = uniform(groups, NVFP4_MAX)
    kept = {f"{second}.self_attn.o_proj": BF16, f"{second}.mamba.in_proj": BF16}
    eight = {f"{first}.mamba.in_proj": FP8}
    flat, nested = files_of(source, everywhere.replace(kept | eight))
    algorithms = {name: own["quant_algo"] for name, own in flat["quantized_layers"].items()}
    assert algorithms[f"{first}.qkv_proj"] == algorithms[f"{first}.o_proj"] == "NVFP4"
    assert (algorithms["model.2.mixer.in_proj"], algorithms["model.2.mixer.out_proj"]) == (
        "FP8",
        "NVFP4",
    )
    for excluded in (flat["ignore"], nested["quantization"]["exclude_modules"]):
        assert {f"{second}.o_proj", "model.3.mixer.in_proj"} < set(excluded)


@pytest.mark.parametrize(
    ("config", "linear", "looked_up"),
    [
        ({"architectures": ["Lfm2MoeForCausalLM"]}, "feed_forward.w2", "feed_forward.down_proj"),
        ({"architectures": ["HrmTextForCausalLM"]}, "attn.o_proj", "self_attn.o_proj"),
    ],
)
def test_a_linear_that_an_engine_calls_otherwise_is_declared_under_both_names(
    config, linear, looked_up
):
    headers, groups = block(linear, "self_attn.out_proj", **config)
    assignment = Assignment.of({f"model.layers.0.{linear}": FP8})
    flat, nested = quantization_files(headers, groups, quantized_linears(groups, assignment))
    assert nested["quantization"]["quant_algo"] == flat["quant_algo"] == "FP8"
    [own] = {own.engine_names for own in groups.linears if own.name.endswith(linear)}
    assert own == (f"model.layers.0.{looked_up}",)
    left = quantization_files(
        headers,
        groups,
        quantized_linears(groups, Assignment.of({"model.layers.0.self_attn.out_proj": FP8})),
    )
    assert f"model.layers.0.{looked_up}" in left[0]["ignore"]


def test_mixtral_is_declared_under_the_names_that_sglang_looks_up():
    """They lack what holds the layers."""
    parts = [f"self_attn.{part}_proj" for part in "qkvo"]
    headers, groups = block(*parts, model_type="mixtral", architectures=["MixtralForCausalLM"])
    assignment = Assignment.of(
        {"model.layers.0.self_attn.qkv": NVFP4_MAX, "model.layers.0.self_attn.o_proj": FP8}
    )
    flat, _ = quantization_files(headers, groups, quantized_linears(groups, assignment))
    assert {"layers.0.self_attn.qkv_proj", "layers.0.self_attn.o_proj"} < flat[
        "quantized_layers"
    ].keys()


def test_zamba2_is_declared_under_the_names_that_vllm_looks_up(tmp_path):
    """Shared blocks stand beside the layers, state-space branches behind the hybrid layers."""
    groups = find_groups(source := open_source(save_model("zamba2", tmp_path)))
    layer, shared = "model.layers.1", "model.layers.1.shared_transformer"
    eight = {f"{shared}.self_attn.qkv": FP8, f"{layer}.linear": FP8}
    kept = {f"{layer}.mamba_decoder.mamba.in_proj": BF16, f"{shared}.feed_forward.down_proj": BF16}
    flat, _ = files_of(source, uniform(groups, NVFP4_MAX).replace(eight | kept))
    algorithms = {name: own["quant_algo"] for name, own in flat["quantized_layers"].items()}
    eights = ("model.qkv_proj", "4.linear")
    fours = ("model.o_proj", "model.feed_forward.gate_up_proj", "3.mixer.in_proj", "6.linear")
    assert {algorithms[name] for name in eights} == {"FP8"}
    assert {algorithms[name] for name in fours} == {"NVFP4"}
    assert {"4.mixer.in_proj", "model.feed_forward.down_proj"} <= set(flat["ignore"])


def test_qwen3_vl_is_declared_under_a_name_that_sglang_makes_the_right_one(tmp_path):
    """It replaces `attn.qkv` by `attn.qkv_proj` in every name that a checkpoint declares."""
    groups = find_groups(source := open_source(save_model("qwen3_vl_moe", tmp_path)))
    joined = "model.language_model.layers.0.self_attn.qkv"
    flat, _ = files_of(source, uniform(groups, FP8).replace({joined: NVFP4_MAX}))
    assert flat["quantized_layers"][joined]["quant_algo"] == "NVFP4"


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe", "deepseek_v3"])
def test_exact_names_only_and_none_excluded_by_a_substring(kind, tmp_path):
    source = open_source(save_model(kind, tmp_path))
    flat, _ = files_of(source, mixed(find_groups(source)))
    assert not any("*" in name for name in flat["ignore"])
    pairs = itertools.product(flat["ignore"], flat["quantized_layers"])
    assert [(entry, name) for entry, name in pairs if entry in name] == []
