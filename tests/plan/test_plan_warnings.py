"""What a plan warns of: linears that nothing is known of, or that an engine keeps in BF16."""

import json

import pytest
from test_grouping import grouped
from tiny_models import save_model

from autoquant.plan.plan import (
    LISTED,
    loading_warnings,
    refused_by,
    source_warnings,
    unknown_warnings,
)
from autoquant.plan.space_file import load_space, parse_space
from autoquant.source.source import open_source

UNKNOWN = "no engine's table and no rule knows"
ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]


def warned(names, *, space="default", layers=1, **config):
    """Warnings of linears of these names in every layer."""
    shapes = {f"model.layers.{i}.{name}.weight": (16, 16) for i in range(layers) for name in names}
    groups = grouped(shapes, **config)
    loaded = parse_space(space, "space.yaml") if "\n" in space else load_space(space)
    options = loaded.options(groups)
    refused = refused_by(config, groups, options.quantized)
    return (*unknown_warnings(groups, options), *loading_warnings(refused))


def opening(match, *formats):
    rule = f"{{match: {json.dumps(match)}, formats: [{', '.join(formats)}]}}"
    return f"schema_version: 1\nname: mine\nrules:\n  - {rule}\n"


def test_linears_that_nothing_knows_are_named_once_for_all_layers():
    (warning,) = warned(["mlp.odd_proj", "mlp.down_proj"], layers=3)
    assert f"{UNKNOWN} model.layers.*.mlp.odd_proj (3): kept in BF16" in warning
    (warning,) = warned(["mlp.odd_proj", "mlp.down_proj"], layers=1)
    assert f"{UNKNOWN} model.layers.*.mlp.odd_proj: kept in BF16" in warning
    assert warned(["mlp.down_proj"]) == ()


@pytest.mark.parametrize("formats", [("fp8", "bf16"), ("fp8",)])
def test_linears_that_a_space_names_are_no_more_unknown(formats):
    assert warned(["mlp.odd_proj"], space=opening("unknown", *formats)) == ()
    (warning,) = warned(["mlp.odd_proj", "mlp.down_proj"], space=opening("down", *formats))
    assert f"{UNKNOWN} model.layers.*.mlp.odd_proj:" in warning


def test_a_list_of_many_names_is_cut():
    names = [f"mlp.odd_{letter}_proj" for letter in "abcdefghij"]
    (whole,) = warned(names[:LISTED])
    assert "odd_h_proj: kept" in whole
    (cut,) = warned(names)
    assert "odd_h_proj and 2 more: kept" in cut
    assert "odd_i_proj" not in cut


def test_matrices_that_no_rule_knows_are_named_and_what_else_is_fixed_is_not():
    groups = grouped(
        {
            "model.layers.0.mystery.weight": (16, 16),
            "model.layers.0.down_proj.scale": (16, 16),
            "model.layers.0.input_layernorm.weight": (16,),
            "model.embed_tokens.weight": (32, 16),
        }
    )
    (warning,) = unknown_warnings(groups, load_space("default").options(groups))
    assert warning == "no rule knows model.layers.*.mystery.weight: kept as they are."


@pytest.mark.parametrize("formats", [("nvfp4", "fp8", "bf16"), ("fp8", "bf16"), ("fp8",)])
def test_what_an_engine_does_not_load_quantized_is_named_where_it_may_be_quantized(formats):
    config = {"architectures": ["GptOssForCausalLM"], "layers": 2}
    (warning,) = warned(ATTENTION, space=opening("*", *formats), **config)
    assert warning == (
        "SGLang 0.5.23 is not known to load a quantized checkpoint of this model, in either "
        "layout: it builds model.layers.*.self_attn.qkv (2), model.layers.*.self_attn.o_proj (2) "
        "without a quantization. Keep them in BF16 by a search space, or serve it with vLLM 0.33.0."
    )
    assert warned(ATTENTION, space=opening("*", "bf16"), **config) == ()
    (warning,) = warned(ATTENTION, space=opening("o", *formats), **config)
    assert "o_proj (2)" in warning
    assert "qkv" not in warning


def test_a_known_model_with_its_weights_is_no_reason_to_warn(tmp_path):
    folder = save_model("llama", tmp_path / "model")
    assert source_warnings(open_source(folder)) == ()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "house_made"}))
    (warning,) = source_warnings(open_source(folder))
    assert "knows no model of the type 'house_made'" in warning
