"""`autoquant plan`."""

import json
import subprocess
import sys

import pytest
from searchable import TOKEN_FLAGS, save_tokenizer
from tiny_models import save_model


@pytest.fixture
def model(tmp_path):
    return save_model("qwen2_moe", tmp_path / "model")


def planned(autoquant, *arguments):
    result = autoquant("plan", *arguments, "--format", "json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_json_holds_groups_sizes_floor_and_ceiling(autoquant, model):
    plan = planned(autoquant, model)
    assert plan["schema_version"] == 1
    assert plan["ceiling"]["bpe"] == {"checkpoint": 16.0, "searched": 16.0}
    assert plan["floor"]["bpe"]["searched"] < plan["floor"]["bpe"]["checkpoint"] < 16
    assert plan["source_bytes"] == 2 * plan["elements"]
    largest = sum(max(group["choices"].values()) for group in plan["groups"])
    smallest = sum(min(group["choices"].values()) for group in plan["groups"])
    fixed = sum(plan["fixed"].values())
    assert plan["ceiling"]["checkpoint_bytes"] == largest + fixed
    assert plan["floor"]["checkpoint_bytes"] == smallest + fixed
    assert plan["probes"] == 7 * sum(len(group["choices"]) > 1 for group in plan["groups"])
    assert plan["budget"] is None


def test_human_output_names_roles_limits_and_what_is_fixed(autoquant, model):
    result = autoquant("plan", model)
    assert result.exit_code == 0
    for text in ("experts", "floor", "ceiling", "NVFP4 FP8 BF16", "routers and gates", "head: "):
        assert text in result.stdout
    assert result.stderr == ""


def test_illegal_format_is_listed_with_its_reason(autoquant, tmp_path):
    model = save_model("llama", tmp_path / "odd", intermediate_size=72)
    text = "down: NVFP4 needs K divisible by 16, and K is 72"
    assert text in autoquant("plan", model).stdout
    groups = {group["name"]: group for group in planned(autoquant, model)["groups"]}
    assert "K is 72" in groups["model.layers.0.mlp.down_proj"]["closed"]["nvfp4"]


def test_budget_below_the_floor_exits_3_with_nothing_on_standard_output(autoquant, model):
    result = autoquant("plan", model, "--budget-bpe", "4")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "below the floor" in result.stderr
    assert "embeddings fixed at BF16 take" in result.stderr


def test_budget_that_can_be_met_is_told_in_bytes(autoquant, model):
    for scope in ("checkpoint", "searched"):
        plan = planned(autoquant, model, "--budget-bpe", "9", "--budget-scope", scope)
        assert plan["budget"]["scope"] == scope
        low, high = (plan[name]["checkpoint_bytes"] for name in ("floor", "ceiling"))
        assert low <= plan["budget"]["max_checkpoint_bytes"] <= high


def test_the_floor_that_is_printed_is_a_budget_that_can_be_met(autoquant, model):
    for scope in ("checkpoint", "searched"):
        floor = planned(autoquant, model)["floor"]
        arguments = ("--budget-bpe", repr(floor["bpe"][scope]), "--budget-scope", scope)
        budget = planned(autoquant, model, *arguments)["budget"]
        assert budget["max_checkpoint_bytes"] == floor["checkpoint_bytes"]


def test_space_decides_what_is_open(autoquant, model):
    groups = planned(autoquant, model, "--space", "experts-only")["groups"]
    assert {g["role"] for g in groups if len(g["choices"]) > 1} == {"experts"}


def test_rule_without_effect_is_a_warning_on_standard_error(autoquant, tmp_path):
    model = save_model("llama", tmp_path / "dense")
    result = autoquant("plan", model, "--space", "experts-only")
    assert result.exit_code == 0
    assert "warning: space experts-only: rules[0] (experts) has no effect" in result.stderr
    assert planned(autoquant, model, "--space", "experts-only")["warnings"]


def test_unknown_space_exits_2(autoquant, model):
    result = autoquant("plan", model, "--space", "defualt")
    assert result.exit_code == 2
    assert "'default'" in result.stderr


def test_missing_model_exits_4(autoquant, tmp_path):
    assert autoquant("plan", tmp_path / "absent").exit_code == 4


def test_no_weight_is_loaded(model):
    """Neither torch nor transformers is imported, and the data of the weights can be garbage."""
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)
    file.write_bytes(content)
    code = (
        "import sys\nfrom autoquant.cli import cli\n"
        f"cli.main(['plan', {str(model)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys(), sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def gpt_neo(tmp_path):
    """An architecture that no engine knows, with names of its own for the MLP."""
    import torch
    import transformers

    folder = tmp_path / "gpt-neo"
    config = transformers.GPTNeoConfig(
        vocab_size=272,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global"], 2]],
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.GPTNeoForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_linears_that_nothing_knows_stay_and_are_named(autoquant, gpt_neo):
    result = autoquant("plan", gpt_neo)
    assert "no engine's table and no rule knows" in result.stderr
    assert "transformer.h.*.mlp.c_fc (2), transformer.h.*.mlp.c_proj (2)" in result.stderr
    groups = {group["name"]: group for group in planned(autoquant, gpt_neo)["groups"]}
    assert groups["transformer.h.0.mlp.c_fc"]["role"] == "unknown"
    assert list(groups["transformer.h.0.mlp.c_fc"]["choices"]) == ["bf16"]
    assert len(groups["transformer.h.0.attn.attention.qkv"]["choices"]) > 1


@pytest.mark.slow
def test_a_space_opens_what_nothing_knows_and_it_is_exported(autoquant, gpt_neo, tmp_path):
    space = tmp_path / "mine.yaml"
    rule = '{match: ["*.c_fc", qkv], formats: [fp8, bf16]}'
    space.write_text(f"schema_version: 1\nname: mine\nrules:\n  - {rule}\n")
    plan = planned(autoquant, gpt_neo, "--space", space)
    opened = [group["name"] for group in plan["groups"] if len(group["choices"]) > 1]
    assert "transformer.h.1.mlp.c_fc" in opened
    assert not any(name.endswith("c_proj") for name in opened)
    mix = tmp_path / "mix.json"
    mix.write_text(json.dumps({"schema_version": 1, "groups": dict.fromkeys(opened, "fp8")}))
    out = tmp_path / "out"
    flags = ("--calibration", "stdlib", *TOKEN_FLAGS)
    result = autoquant("export", gpt_neo, "--assignment", mix, "--out", out, *flags)
    assert result.exit_code == 0, result.stderr
    verified = autoquant("verify", out, "--source", gpt_neo, "--format", "json")
    assert json.loads(verified.stdout)["ok"], verified.stdout
