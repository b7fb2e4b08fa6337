"""Groups of models of which an engine or transformers does something of its own."""

import transformers
from test_grouping import grouped
from tiny_models import save_model

from autoquant.formats import BF16
from autoquant.plan.grouping import find_groups
from autoquant.plan.space_file import load_space
from autoquant.source.names import Fixed
from autoquant.source.source import open_source


def test_blocks_that_an_engine_looks_up_under_one_name_are_one_group(tmp_path):
    """vLLM calls q, k and v of both shared blocks `model.qkv_proj`: one format, two scales."""
    groups = find_groups(open_source(save_model("zamba2", tmp_path, num_mem_blocks=2)))
    first, second = (f"model.layers.{layer}.shared_transformer.self_attn" for layer in (1, 3))
    found = groups[f"{first}.qkv"]
    assert {linear.name for linear in found.linears} == {
        f"{block}.{part}_proj" for block in (first, second) for part in "qkv"
    }
    assert {own.weight_scale_set for own in found.linears} == {f"{first}.qkv", f"{second}.qkv"}
    named = [
        name for group in groups for name in {n for x in group.linears for n in x.engine_names}
    ]
    assert len(named) == len(set(named))
    assert len(groups[f"{first}.o_proj"].linears) == 2
    assert not any(group.name.startswith(second) for group in groups)


def test_layers_that_one_engine_alone_does_not_tell_apart_are_groups_of_their_own(tmp_path):
    """SGLang asks for `self_attn.qkv_proj` of every layer of Gemma 2, and vLLM for each."""
    groups = find_groups(open_source(save_model("gemma2", tmp_path)))
    assert {"model.layers.0.self_attn.qkv", "model.layers.1.self_attn.qkv"} < groups.by_name.keys()


def test_experts_that_transformers_runs_in_a_way_of_their_own_are_closed(tmp_path):
    config = transformers.LongcatFlashConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=2,
        ffn_hidden_size=32,
        expert_ffn_hidden_size=32,
        q_lora_rank=16,
        kv_lora_rank=16,
        n_routed_experts=4,
        zero_expert_num=2,
    )
    config.save_pretrained(tmp_path)
    groups = find_groups(open_source(tmp_path, weights=False))
    closed = {group.name: group.closed for group in groups if group.closed}
    assert list(closed) == ["model.layers.0.mlp.experts"]
    assert "a forward of their own" in closed["model.layers.0.mlp.experts"]
    options = load_space("default").options(groups)
    assert options.choices["model.layers.0.mlp.experts"] == (BF16,)
    assert len(options.choices["model.layers.0.mlps.0.down_proj"]) > 1


def test_experts_of_which_text_reaches_a_part_are_closed():
    parts = [f"mlp.experts.{expert}.{part}_proj" for expert in range(4) for part in ("up", "down")]
    shapes = {f"model.layers.0.{part}.weight": (16, 16) for part in parts}
    assert not grouped(shapes, model_type="ernie4_5_moe")["model.layers.0.mlp.experts"].closed
    (group,) = grouped(shapes, model_type="ernie4_5_vl_moe_text")
    assert "others that no text reaches" in group.closed


def test_a_tower_of_another_name_is_copied():
    layers = {f"{tower}.layers.0.self_attn.q_proj.weight": (16, 16) for tower in ("model", "vit")}
    groups = grouped(layers)
    assert [group.name for group in groups] == ["model.layers.0.self_attn.q_proj"]
    (fixed,) = groups.fixed
    assert (fixed.name, fixed.reason) == ("vit.layers.0.self_attn.q_proj.weight", Fixed.TOWER)
