"""Where channels may have any size, by the names of tensors."""

import dataclasses

import pytest
from tiny_models import save_model

from autoquant.equalize.sites import Part, find_sites
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source


def sites_of(kind, folder):
    source = open_source(save_model(kind, folder) or folder)
    return find_sites(source.headers.tensors, find_groups(source)), source


def of_layer(sites, layer, part):
    return [own for own in sites if f"layers.{layer}." in own.name and own.part is part]


def test_a_dense_block_has_two_norms_and_an_up_projection(tmp_path):
    sites, _ = sites_of("llama", tmp_path)
    (attention,) = of_layer(sites, 1, Part.ATTENTION)
    (feed_forward,) = of_layer(sites, 1, Part.FEED_FORWARD)
    (down,) = of_layer(sites, 1, Part.DOWN)
    block = "model.layers.1."
    assert attention.rows == (f"{block}input_layernorm.weight",)
    assert sorted(attention.columns) == [f"{block}self_attn.{c}_proj.weight" for c in "kqv"]
    assert feed_forward.rows == (f"{block}post_attention_layernorm.weight",)
    assert sorted(feed_forward.columns) == [
        f"{block}mlp.{name}_proj.weight" for name in ("gate", "up")
    ]
    assert down.rows == (f"{block}mlp.up_proj.weight",)
    assert down.columns == (f"{block}mlp.down_proj.weight",)
    assert down.matrix is None


def test_a_bias_of_what_makes_channels_is_scaled_with_them(tmp_path):
    sites, source = sites_of("llama", tmp_path)
    tensors = dict(source.headers.tensors)
    up = next(t for name, t in tensors.items() if name.endswith("layers.0.mlp.up_proj.weight"))
    bias = dataclasses.replace(up, name=up.name.replace("weight", "bias"), shape=up.shape[:1])
    found = find_sites(tensors | {bias.name: bias}, find_groups(source))
    (down,) = of_layer(found, 0, Part.DOWN)
    assert down.rows == (up.name, bias.name)
    assert len(found) == len(sites)


@pytest.mark.parametrize(
    ("kind", "router", "experts"),
    [("qwen3_moe", "mlp.gate.weight", 4), ("mixtral", "block_sparse_moe.gate.weight", 4)],
)
def test_routers_read_the_norm_too_and_experts_have_channels_of_their_own(
    tmp_path, kind, router, experts
):
    sites, _ = sites_of(kind, tmp_path)
    (norm,) = of_layer(sites, 0, Part.FEED_FORWARD)
    assert f"model.layers.0.{router}" in norm.columns
    assert len(norm.columns) == 2 * experts + 1
    assert norm.matrix is None
    assert [own.matrix for own in of_layer(sites, 0, Part.DOWN)] == [*range(experts)]


def test_shared_experts_and_their_gate_read_the_norm_too(tmp_path):
    sites, _ = sites_of("qwen2_moe", tmp_path)
    (norm,) = of_layer(sites, 0, Part.FEED_FORWARD)
    assert "model.layers.0.mlp.shared_expert_gate.weight" in norm.columns
    assert "model.layers.0.mlp.shared_expert.up_proj.weight" in norm.columns
    shared = [own for own in of_layer(sites, 0, Part.DOWN) if own.matrix is None]
    assert [own.columns for own in shared] == [
        ("model.layers.0.mlp.shared_expert.down_proj.weight",)
    ]


def test_a_norm_that_both_halves_of_a_block_read_is_left_alone(tmp_path):
    sites, _ = sites_of("cohere", tmp_path)
    assert {own.part for own in sites} == {Part.DOWN}


@pytest.mark.parametrize("change", [{"dtype": "F16"}, {"stored_dtype": "F8_E4M3"}])
def test_what_cannot_be_scaled_without_loss_is_left_alone(tmp_path, change):
    sites, source = sites_of("llama", tmp_path)
    tensors = dict(source.headers.tensors)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = dataclasses.replace(tensors[name], **change)
    found = find_sites(tensors, find_groups(source))
    assert len(found) == len(sites) - 1
    assert not of_layer(found, 0, Part.DOWN)
