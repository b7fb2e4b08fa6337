"""Which linears share a format, in real architectures and by names that only large models have."""

import json
import math
from pathlib import Path

import pytest
from tiny_models import MODELS, change_tensors, save_model

from autoquant.errors import ConfigError, SourceError
from autoquant.formats import BF16, FP8, NVFP4
from autoquant.plan.grouping import Groups, find_groups, group_tensors
from autoquant.plan.space_file import load_space
from autoquant.source.headers import TensorHeader
from autoquant.source.names import ROLES, Fixed
from autoquant.source.source import open_source

ATTENTION = {"self_attn.qkv": "qkv", "self_attn.o_proj": "o"}
MLA = {"self_attn.qkv_a": "qkv_a", "self_attn.q_b_proj": "q_b", "self_attn.o_proj": "o"}
MLP = {"mlp.gate_up": "gate_up", "mlp.down_proj": "down"}
EXPERTS = {"mlp.experts": "experts"}
GDN = {"linear_attn.in_proj_qkvz": "gdn_in", "linear_attn.out_proj": "out"}
DISK_EXPERTS = {"block_sparse_moe.experts": "experts"}

LAYERS = {
    "llama": (ATTENTION | MLP, ATTENTION | MLP),
    "qwen2": (ATTENTION | MLP, ATTENTION | MLP),
    "qwen3": (ATTENTION | MLP, ATTENTION | MLP),
    "qwen2_moe": (ATTENTION | EXPERTS, ATTENTION | EXPERTS),
    "qwen3_moe": (ATTENTION | EXPERTS, ATTENTION | EXPERTS),
    "mixtral": (ATTENTION | DISK_EXPERTS, ATTENTION | DISK_EXPERTS),
    "minimax_m2": (ATTENTION | DISK_EXPERTS, ATTENTION | DISK_EXPERTS),
    "deepseek_v3": (MLA | MLP, MLA | EXPERTS),
    "glm4_moe": (ATTENTION | MLP, ATTENTION | EXPERTS),
    "qwen3_next": (GDN | EXPERTS, ATTENTION | EXPERTS),
    "nemotron_h": (
        {"mixer.in_proj": "in", "mixer.out_proj": "out"},
        {
            "mixer.experts": "experts",
            "mixer.fc1_latent_proj": "other",
            "mixer.fc2_latent_proj": "other",
        },
        {"mixer.qkv": "qkv", "mixer.o_proj": "o"},
        {"mixer.up_proj": "gate_up", "mixer.down_proj": "down"},
    ),
    "gpt_oss": (ATTENTION, ATTENTION),
    "minimax_m3_vl": (ATTENTION | MLP, ATTENTION | DISK_EXPERTS),
    "qwen3_vl_moe": (ATTENTION | EXPERTS, ATTENTION | EXPERTS),
}
PREFIX = {
    "nemotron_h": "backbone",
    "minimax_m3_vl": "language_model.model",
    "qwen3_vl_moe": "model.language_model",
}


def grouped(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16", **config: object) -> Groups:
    separate = config.pop("shared_experts", "with_routed")
    tensors = {
        name: TensorHeader(
            name=name, dtype=dtype, shape=shape, file=Path("x"), begin=0, end=2 * math.prod(shape)
        )
        for name, shape in shapes.items()
    }
    return group_tensors(tensors, config, config, shared_experts=separate)


def reasons(groups: Groups) -> dict[str, Fixed]:
    return {tensor.name: tensor.reason for tensor in groups.fixed}


@pytest.mark.parametrize("kind", MODELS)
def test_groups_of_a_real_model(kind, tmp_path):
    groups = find_groups(open_source(save_model(kind, tmp_path)))
    expected = [
        (f"{PREFIX.get(kind, 'model')}.layers.{layer}.{name}", role, layer)
        for layer, roles in enumerate(LAYERS[kind])
        for name, role in roles.items()
    ]
    if kind != "qwen3":
        head = "language_model.lm_head" if kind == "minimax_m3_vl" else "lm_head"
        expected.append((head, "head", None))
    assert [(group.name, group.role, group.layer) for group in groups] == expected


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shared_experts", ["with_routed", "separate"])
def test_every_tensor_is_in_one_group_or_fixed(kind, shared_experts, tmp_path):
    source = open_source(save_model(kind, tmp_path))
    groups = find_groups(source, shared_experts=shared_experts)
    placed = [linear.tensor for linear in groups.linears] + [t.name for t in groups.fixed]
    assert sorted(placed) == sorted(source.headers.tensors)
    for linear in groups.linears:
        shape = (linear.out_features, linear.in_features)
        assert source.headers[linear.tensor].shape == shape
    assert {group.role for group in groups} <= set(ROLES)


def test_attention_and_mlp_parts_share_both_scales(tmp_path):
    groups = find_groups(open_source(save_model("llama", tmp_path)))
    for group in groups:
        assert {linear.weight_scale_set for linear in group.linears} == {group.name}
        assert {linear.input_scale_set for linear in group.linears} == {group.name}


@pytest.mark.parametrize(
    ("kind", "container", "gate", "up", "down"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts", "gate_proj", "up_proj", "down_proj"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts", "w1", "w3", "w2"),
    ],
)
def test_experts_share_input_scales_by_product_and_weight_scales_by_expert(
    kind, container, gate, up, down, tmp_path
):
    group = find_groups(open_source(save_model(kind, tmp_path)))[container]
    linears = {linear.name.removeprefix(f"{container}."): linear for linear in group.linears}
    assert len(linears) == 12
    weights = {name: linear.weight_scale_set for name, linear in linears.items()}
    inputs = {name: linear.input_scale_set for name, linear in linears.items()}
    for expert in range(4):
        assert weights[f"{expert}.{gate}"] == weights[f"{expert}.{up}"]
        assert weights[f"{expert}.{gate}"] != weights[f"{expert}.{down}"]
    assert len(set(weights.values())) == 8
    assert len({inputs[f"{e}.{p}"] for e in range(4) for p in (gate, up)}) == 1
    assert len({inputs[f"{e}.{down}"] for e in range(4)}) == 1
    assert len(set(inputs.values())) == 2


def test_shared_expert_goes_with_the_routed_ones_but_keeps_its_scales(tmp_path):
    groups = find_groups(open_source(save_model("qwen2_moe", tmp_path)))
    linears = groups["model.layers.0.mlp.experts"].linears
    shared = {n.name.rpartition(".")[2]: n for n in linears if "shared_expert" in n.name}
    assert set(shared) == {"gate_proj", "up_proj", "down_proj"}
    assert shared["gate_proj"].weight_scale_set == shared["up_proj"].weight_scale_set
    routed = [n for n in linears if "shared_expert" not in n.name]
    for name in ("weight_scale_set", "input_scale_set"):
        own = {getattr(n, name) for n in shared.values()}
        assert len(own) == 2
        assert own.isdisjoint({getattr(n, name) for n in routed})


def test_shared_expert_can_be_separate(tmp_path):
    source = open_source(save_model("deepseek_v3", tmp_path))
    groups = find_groups(source, shared_experts="separate")
    roles = {group.name: group.role for group in groups if "shared" in group.name}
    assert roles == {
        "model.layers.1.mlp.shared_experts.gate_up": "shared_gate_up",
        "model.layers.1.mlp.shared_experts.down_proj": "shared_down",
    }
    assert len(groups["model.layers.1.mlp.experts"].linears) == 12


def test_experts_are_in_numeric_order():
    shapes = {f"model.layers.0.mlp.experts.{e}.down_proj.weight": (16, 16) for e in range(11)}
    (group,) = grouped(shapes).groups
    assert [linear.name.split(".")[5] for linear in group.linears] == [str(e) for e in range(11)]


def test_why_tensors_of_real_models_are_fixed(tmp_path):
    fixed = reasons(find_groups(open_source(save_model("deepseek_v3", tmp_path))))
    assert fixed["model.embed_tokens.weight"] is Fixed.EMBEDDING
    assert fixed["model.norm.weight"] is Fixed.VECTOR
    assert fixed["model.layers.1.mlp.gate.weight"] is Fixed.ROUTER
    assert fixed["model.layers.0.self_attn.kv_b_proj.weight"] is Fixed.KV_B
    fixed = reasons(find_groups(open_source(save_model("hrm_text", tmp_path / "hrm"))))
    for part in ("mlp.gate_up_proj", "attn.gqkv_proj"):
        assert fixed[f"model.L_module.layers.1.{part}.weight"] is Fixed.HELD_IN_PARTS
    fixed = reasons(find_groups(open_source(save_model("qwen2_moe", tmp_path / "qwen"))))
    assert fixed["model.layers.0.mlp.shared_expert_gate.weight"] is Fixed.ROUTER
    assert fixed["model.layers.0.self_attn.q_proj.bias"] is Fixed.BIAS


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.4.mlp.down_proj.weight", (16, 16), Fixed.MTP),
        ("model.mtp.layers.0.mlp.down_proj.weight", (16, 16), Fixed.MTP),
        ("mtp.fc.weight", (16, 32), Fixed.MTP),
        ("model.vision_tower.layers.0.self_attn.q_proj.weight", (16, 16), Fixed.TOWER),
        ("model.visual.blocks.0.attn.qkv.weight", (48, 16), Fixed.TOWER),
        ("audio_tower.layers.0.fc1.weight", (16, 16), Fixed.TOWER),
        ("multi_modal_projector.linear_1.weight", (16, 16), Fixed.TOWER),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 32, 16), Fixed.FUSED_EXPERTS),
        ("model.layers.0.linear_attn.conv1d.weight", (16, 1, 4), Fixed.CONVOLUTION),
        ("model.layers.0.linear_attn.in_proj_a.weight", (4, 16), Fixed.STATE_SPACE),
        ("model.layers.0.linear_attn.in_proj_ba.weight", (4, 16), Fixed.STATE_SPACE),
        ("model.layers.0.linear_attn.A_log", (4,), Fixed.VECTOR),
        ("model.layers.0.linear_attn.q_conv1d.weight", (16, 4), Fixed.CONVOLUTION),
        ("model.layers.0.mlp.router.weight", (4, 16), Fixed.ROUTER),
        ("model.layers.0.router.proj.weight", (4, 16), Fixed.ROUTER),
        ("model.layers.0.mlp.router.mlp.fc1.weight", (4, 16), Fixed.ROUTER),
        ("model.layers.0.mlp.gate.linear.weight", (4, 16), Fixed.ROUTER),
        ("model.layers.0.mystery.weight", (16, 16), Fixed.UNKNOWN),
        ("model.layers.0.mixer.short_convs.0.weight", (16, 1, 4), Fixed.CONVOLUTION),
        ("model.layers.0.mlp.down_proj.weight", (4, 16, 16), Fixed.UNKNOWN),
        ("model.layers.0.mlp.down_proj.scale", (16, 16), Fixed.UNKNOWN),
        ("scale", (1,), Fixed.VECTOR),
        ("table", (16, 16), Fixed.UNKNOWN),
        ("model.project_in.weight", (16, 16), Fixed.UNKNOWN),
        ("lm_head.weight", (0, 16), Fixed.UNKNOWN),
    ],
)
def test_what_is_never_quantized(name, shape, reason):
    groups = grouped({name: shape}, num_hidden_layers=4)
    assert not groups.groups
    assert reasons(groups) == {name: reason}


@pytest.mark.parametrize(
    ("names", "group", "role"),
    [
        (("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), "in_proj_qkvz", "gdn_in"),
        (("linear_attn.in_proj_qkvz",), "in_proj_qkvz", "gdn_in"),
        (("mixer.in_proj",), "in_proj", "in"),
        (("mixer.out_proj",), "out_proj", "out"),
        (("mixer.up_proj",), "up_proj", "gate_up"),
        (("self_attn.qkv_proj",), "qkv_proj", "qkv"),
        (("self_attn.q_proj",), "q_proj", "qkv"),
        (("feed_forward.w1", "feed_forward.w3"), "w13", "gate_up"),
        (("mlp.c_fc_0", "mlp.c_fc_1"), "c_fc", "gate_up"),
        (("mlp.strange_proj",), "strange_proj", "unknown"),
    ],
)
def test_names_of_other_architectures(names, group, role):
    groups = grouped({f"backbone.layers.3.{name}.weight": (16, 16) for name in names})
    parent = names[0].partition(".")[0]
    (found,) = groups.groups
    assert (found.name, found.role) == (f"backbone.layers.3.{parent}.{group}", role)
    assert len(found.linears) == len(names)


def test_a_linear_inside_of_a_module_called_conv_is_no_convolution():
    groups = grouped(
        {
            "model.layers.0.conv.in_proj.weight": (48, 16),
            "model.layers.0.conv.conv.weight": (16, 1, 3),
        },
        architectures=["Lfm2ForCausalLM"],
    )
    assert [group.name for group in groups] == ["model.layers.0.conv.in_proj"]
    assert reasons(groups) == {"model.layers.0.conv.conv.weight": Fixed.CONVOLUTION}


@pytest.mark.parametrize(
    ("architecture", "parent", "parts", "group"),
    [
        ("OlmoHybridForCausalLM", "linear_attn", "q_proj k_proj v_proj g_proj", "in_proj_qkvg"),
        (
            "KimiLinearForCausalLM",
            "self_attn",
            "q_proj k_proj v_proj b_proj f_a_proj",
            "in_proj_qkvgfab",
        ),
        ("BailingMoeV3ForCausalLM", "attention", "q_proj k_proj v_proj b_proj", "qkvb_proj"),
        ("MiMoV2FlashForCausalLM", "self_attn", "q_proj k_proj v_proj", "qkv"),
    ],
)
def test_what_an_engine_joins_is_one_group(architecture, parent, parts, group):
    names = [f"model.layers.0.{parent}.{part}" for part in parts.split()]
    groups = grouped(
        {f"{name}.weight": (16, 16) for name in names}, architectures=[architecture]
    ).groups
    (found,) = groups
    assert found.name == f"model.layers.0.{parent}.{group}"
    assert {linear.weight_scale_set for linear in found.linears} == {found.name}
    assert {linear.input_scale_set for linear in found.linears} == {found.name}
    assert not found.closed


def test_a_matrix_of_another_kind_of_block_joins_nothing():
    """Of the six that Kimi's linear attention joins, its full attention has two."""
    parts = ("q_proj", "g_proj", "o_proj")
    groups = grouped(
        {f"model.layers.0.self_attn.{part}.weight": (16, 16) for part in parts},
        architectures=["KimiLinearForCausalLM"],
    )
    assert len(groups) == len(parts)


def test_an_engine_joins_linears_of_two_modules():
    names = ["q_proj", "k_proj", "v_proj", "indexer.index_qk_proj"]
    (group,) = grouped(
        {f"model.layers.3.self_attn.{name}.weight": (16, 16) for name in names},
        architectures=["Qwen4ExpForCausalLM"],
    ).groups
    assert len(group.linears) == 4
    assert group.name.rpartition(".")[0] == "model.layers.3.self_attn"
    assert {linear.input_scale_set for linear in group.linears} == {group.name}


def test_what_an_engine_builds_unquantized_stays_and_says_whose_word_that_is():
    parts = ("wk", "weights_proj", "wq_b")
    groups = grouped(
        {f"model.layers.0.self_attn.indexer.{part}.weight": (16, 16) for part in parts},
        model_type="glm_moe_dsa",
    )
    joined = groups["model.layers.0.self_attn.indexer.wk_weights_proj"]
    assert joined.closed == "vLLM 0.33.0 builds it without a quantization"
    assert joined.why_illegal(FP8.format) == joined.closed
    assert len(joined.linears) == 2
    assert not groups["model.layers.0.self_attn.indexer.wq_b"].closed


@pytest.mark.parametrize("architecture", ["GlmMoeDsaForCausalLM", "HouseMadeForCausalLM"])
def test_an_indexer_stays_until_a_space_names_it(architecture):
    groups = grouped(
        {f"model.layers.0.self_attn.{p}.weight": (16, 16) for p in ("indexer.q_proj", "o_proj")},
        architectures=[architecture],
    )
    name = "model.layers.0.self_attn.indexer.q_proj"
    assert groups[name].role == "indexer"
    options = load_space("default").options(groups)
    assert options.choices[name] == (BF16,)
    assert "sparse attention" in options.closed[name][FP8.format]
    assert options.open == ("model.layers.0.self_attn.o_proj",)


def test_an_engine_that_refuses_what_vllm_loads_is_named():
    groups = grouped(
        {f"model.layers.0.self_attn.{p}_proj.weight": (16, 16) for p in "qkvo"},
        architectures=["GptOssForCausalLM"],
    )
    assert {group.caution for group in groups} == {"SGLang 0.5.23"}
    assert {group.closed for group in groups} == {""}


def test_an_architecture_that_no_engine_knows_goes_by_names():
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.odd_proj")
    groups = grouped(
        {f"model.layers.0.{name}.weight": (16, 16) for name in names},
        architectures=["HouseMadeForCausalLM"],
    )
    assert {group.name.removeprefix("model.layers.0."): group.role for group in groups} == {
        "self_attn.qkv": "qkv",
        "mlp.gate_up": "gate_up",
        "mlp.odd_proj": "unknown",
    }


def test_names_join_what_the_engines_of_an_architecture_do_not_know():
    parts = ("mixer.w1", "mixer.w3", "mixer.strange")
    groups = grouped(
        {f"model.layers.0.{part}.weight": (16, 16) for part in parts},
        architectures=["LlamaForCausalLM"],
    )
    assert [group.name for group in groups] == ["model.layers.0.mixer.w13"]
    assert reasons(groups) == {"model.layers.0.mixer.strange.weight": Fixed.UNKNOWN}


def test_names_join_nothing_across_modules():
    names = ("feed.w1", "memory.w3")
    groups = grouped({f"model.layers.0.{name}.weight": (16, 16) for name in names}).groups
    assert [group.name for group in groups] == [f"model.layers.0.{name}" for name in names]


def test_a_linear_of_a_shared_expert_that_nothing_knows_stays_out_of_the_experts():
    groups = grouped(
        {
            "model.layers.0.mlp.experts.0.down_proj.weight": (16, 16),
            "model.layers.0.mlp.shared_experts.down_proj.weight": (16, 16),
            "model.layers.0.mlp.shared_experts.odd_proj.weight": (16, 16),
        }
    )
    assert {group.role: len(group.linears) for group in groups} == {"experts": 2, "unknown": 1}


def test_tied_head_on_disk_is_fixed_and_an_untied_one_is_a_group():
    shapes = {"lm_head.weight": (32, 16)}
    assert reasons(grouped(shapes, tie_word_embeddings=True)) == {"lm_head.weight": Fixed.TIED_HEAD}
    assert [group.role for group in grouped(shapes, tie_word_embeddings=False)] == ["head"]


@pytest.mark.parametrize(
    ("config", "is_tied"),
    [
        ({"model_type": "gemma"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "gemma", "tie_word_embeddings": False}, False),
        ({"model_type": "unheard_of"}, False),
        ({}, False),
    ],
)
def test_a_config_that_does_not_say_so_has_the_default_of_its_class(config, is_tied):
    groups = grouped({"lm_head.weight": (32, 16)}, **config)
    assert [group.role for group in groups] == ([] if is_tied else ["head"])
    assert reasons(groups) == ({"lm_head.weight": Fixed.TIED_HEAD} if is_tied else {})


def test_a_redundant_head_of_an_old_model_is_not_quantized(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "gemma", ("Gemma", MODELS["llama"][1]))
    folder = save_model("gemma", tmp_path / "gemma")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(config))

    def store_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(folder, store_head)
    groups = find_groups(open_source(folder))
    assert "head" not in {group.role for group in groups}
    assert reasons(groups)["lm_head.weight"] is Fixed.TIED_HEAD


def test_integer_weights_are_fixed():
    groups = grouped({"model.layers.0.mlp.down_proj.weight": (16, 16)}, dtype="I32")
    assert list(reasons(groups).values()) == [Fixed.DTYPE]


def test_transposed_matrices_are_fixed():
    groups = grouped({"transformer.h.0.mlp.c_proj.weight": (64, 16)}, model_type="gpt2")
    assert list(reasons(groups).values()) == [Fixed.TRANSPOSED]


def test_linear_whose_inputs_are_no_multiple_of_16_says_so():
    (group,) = grouped({"model.layers.0.mlp.down_proj.weight": (16, 24)}).groups
    assert group.why_illegal(NVFP4.format) == (
        "model.layers.0.mlp.down_proj: NVFP4 needs K divisible by 16, and K is 24"
    )
    assert group.why_illegal(FP8.format) is None


def test_unknown_group_is_a_config_error(tmp_path):
    groups = find_groups(open_source(save_model("llama", tmp_path)))
    with pytest.raises(ConfigError, match="no layer group 'nonsense'"):
        groups["nonsense"]


def test_model_without_any_linear_is_an_error(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"model.embed_tokens.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"holds no linear layer that can be quantized\. "):
        find_groups(open_source(tmp_path))
    matrix = {"transformer.h.0.attn.c_attn.weight": torch.ones(4, 12)}
    save_file(matrix, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    said = r"quantized: transformer\.h\.0\.attn\.c_attn\.weight is one of its transposed matrices"
    with pytest.raises(SourceError, match=said):
        find_groups(open_source(tmp_path))
