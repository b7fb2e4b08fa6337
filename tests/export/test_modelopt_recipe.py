"""Assignments as recipes of NVIDIA ModelOpt, and ModelOpt itself on them."""

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from exported import NVFP4_46, NVFP4_MAX
from tiny_models import save_model

from autoquant.export.declaration import quantized_linears
from autoquant.export.layouts.recipe import modelopt_recipe
from autoquant.formats import FP8, Choice
from autoquant.formats.kv_cache import KvCache
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

BITS = {"fp8": (4, 3), "nvfp4": (2, 1)}
MIX = {
    "llama": {"self_attn.qkv": NVFP4_MAX, "self_attn.o_proj": FP8, "mlp.down_proj": NVFP4_46},
    "qwen3_moe": {"self_attn.qkv": FP8, "mlp.experts": NVFP4_MAX},
    "mixtral": {"self_attn.o_proj": NVFP4_MAX, "block_sparse_moe.experts": FP8},
}


def mix_of(kind: str) -> Assignment:
    """Formats in the first layer; the second stays in BF16."""
    return Assignment.of({f"model.layers.0.{name}": c for name, c in MIX[kind].items()})


def save(kind: str, folder: Path) -> Path:
    return save_model(kind, folder, **({} if kind == "llama" else {"num_experts_per_tok": 2}))


def enabled(recipe: dict[str, Any], quantizer: str) -> tuple[int, int] | None:
    """Bits that the last entry that matches a quantizer gives it; None if it is off."""
    last = [
        e
        for e in recipe["quantize"]["quant_cfg"]
        if fnmatch.fnmatch(quantizer, e["quantizer_name"])
    ]
    cfg = last[-1].get("cfg")
    return tuple(cfg["num_bits"]) if cfg else None


def test_recipe_turns_on_the_quantizers_of_the_assignment_and_no_others(tmp_path):
    groups = find_groups(open_source(save("llama", tmp_path)))
    choices = quantized_linears(groups, mix_of("llama"))
    recipe = yaml.safe_load(yaml.safe_dump(modelopt_recipe(choices, KvCache.BF16)))
    for linear in groups.linears:
        expected = BITS[str(choices[linear.name].format)] if linear.name in choices else None
        for tensor in ("weight", "input"):
            assert enabled(recipe, f"{linear.name}.{tensor}_quantizer") == expected
        assert enabled(recipe, f"{linear.name}.output_quantizer") is None
    assert enabled(recipe, "model.layers.0.self_attn.k_bmm_quantizer") is None


@pytest.mark.parametrize(
    ("choice", "loses"),
    [
        ("fp8", False),
        ("nvfp4/max", False),
        ("nvfp4/max/a16", False),
        ("nvfp4/mse", True),
        ("nvfp4/max/gptq", True),
    ],
)
def test_a_recipe_says_that_it_cannot_carry_codes(choice, loses):
    choices = {"q": FP8, "o": Choice.parse(choice)}
    recipe = modelopt_recipe(choices, KvCache.BF16)
    assert ("cannot carry codes" in recipe["metadata"]["description"]) == loses


def test_names_that_memory_spells_otherwise_are_matched():
    choices = {
        "model.language_model.layers.3.mlp.down_proj": FP8,
        "backbone.layers.1.mixer.in_proj": NVFP4_MAX,
        "model.layers.2.block_sparse_moe.experts.7.w1": FP8,
    }
    recipe = modelopt_recipe(choices, KvCache.FP8)
    for name, bits in {
        "model.layers.3.mlp.down_proj.weight_quantizer": (4, 3),
        "model.language_model.layers.3.mlp.down_proj.input_quantizer": (4, 3),
        "model.layers.1.mixer.in_proj.weight_quantizer": (2, 1),
        "model.layers.2.mlp.experts.gate_up_proj_weight_quantizers.7": (4, 3),
        "model.layers.2.mlp.experts.down_proj_input_quantizer": (4, 3),
        "model.layers.2.mlp.experts.7.down_proj.weight_quantizer": (4, 3),
        "model.layers.2.mlp.gate.weight_quantizer": None,
        "model.layers.12.mlp.experts.down_proj_input_quantizer": None,
        "model.visual.layers.3.mlp.down_proj.weight_quantizer": None,
        "model.layers.3.self_attn.v_bmm_quantizer": (4, 3),
        "model.layers.3.self_attn.q_bmm_quantizer": None,
    }.items():
        assert enabled(recipe, name) == bits, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIX)
def test_modelopt_enables_exactly_these_quantizers(kind, autoquant, tmp_path):
    """ModelOpt simulates NVFP4 on GPUs alone, but inserts and sets up its quantizers anywhere."""
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe
    from transformers import AutoModelForCausalLM

    folder = save(kind, tmp_path / "source")
    (tmp_path / "mix.json").write_text(json.dumps(mix_of(kind).to_dict()))
    result = autoquant(
        *("export", folder, "--assignment", tmp_path / "mix.json", "--kv-cache", "fp8"),
        *("--modelopt-recipe", tmp_path / "recipe.yaml"),
    )
    assert result.exit_code == 0, result.stderr
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokens = torch.arange(32).reshape(2, 16)
    model = mtq.quantize(model, recipe.quantize.model_dump(), lambda m: m(tokens))
    found = {
        name: (tuple(module.num_bits), module.block_sizes)
        for name, module in model.named_modules()
        if type(module).__name__ == "TensorQuantizer" and module.is_enabled
    }
    cached = {name for name in found if name.endswith(("k_bmm_quantizer", "v_bmm_quantizer"))}
    assert len(cached) == 4
    assert {found.pop(name) for name in cached} == {((4, 3), None)}
    weights = {name: bits for name, (bits, _) in found.items() if "weight_quantizer" in name}
    expected = {}
    for group, choice in mix_of(kind):
        parent, _, last = group.rpartition(".")
        names = {
            "qkv": [f"{parent}.{part}_proj.weight_quantizer" for part in "qkv"],
            "experts": [
                f"{parent.replace('block_sparse_moe', 'mlp')}.experts.{part}_weight_quantizers.{e}"
                for part in ("gate_up_proj", "down_proj")
                for e in range(4)
            ],
        }.get(last, [f"{group}.weight_quantizer"])
        expected |= dict.fromkeys(names, BITS[str(choice.format)])
    assert weights == expected
    for name, (bits, blocks) in found.items():
        assert name.startswith("model.layers.0.")
        assert "weight_quantizer" in name or name.endswith("input_quantizer")
        if bits == (2, 1):
            assert (blocks[-1], tuple(blocks["scale_bits"])) == (16, (4, 3))


def test_recipe_alone_needs_no_text_and_no_folder(autoquant, tmp_path):
    folder = save("llama", tmp_path / "source")
    (tmp_path / "mix.json").write_text(json.dumps(mix_of("llama").to_dict()))
    what = ("export", folder, "--assignment", tmp_path / "mix.json")
    result = autoquant(*what, "--modelopt-recipe", tmp_path / "r.yaml", "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["recipe"] == str(tmp_path / "r.yaml")
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["metadata"]["recipe_type"] == "ptq"
    nothing = autoquant(*what)
    assert nothing.exit_code == 2
    assert "neither --out nor --modelopt-recipe" in nothing.stderr
    unwritable = autoquant(*what, "--modelopt-recipe", tmp_path / "absent" / "r.yaml")
    assert unwritable.exit_code == 2
    assert "cannot be written" in unwritable.stderr
