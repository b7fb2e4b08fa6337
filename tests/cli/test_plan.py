"""`autoquant plan`."""

import json
import subprocess
import sys

import pytest
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
    assert plan["probes"] == 4 * sum(len(group["choices"]) > 1 for group in plan["groups"])
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
