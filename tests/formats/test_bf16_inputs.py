"""NVFP4 weights with BF16 inputs: a choice a space may open, from the plan to the checkpoint."""

import json
import re

import pytest
import torch
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.codes.book import CodeBook
from autoquant.codes.weights import FileWeights
from autoquant.errors import ConfigError, SourceError
from autoquant.export.export import export
from autoquant.export.layouts.base import Layout
from autoquant.export.read_back import open_quantized
from autoquant.export.verify import verify
from autoquant.formats import A16, BF16, FP8, NVFP4, Choice, all_formats, choices_of
from autoquant.plan.activation_mode import ActivationMode, Target
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

NVFP4_A16 = Choice.parse("nvfp4/mse/a16")
SPACE = """
schema_version: 1
name: with-a16
scale_rules: [max, mse]
rules:
  - match: [qkv, down]
    formats: [nvfp4, nvfp4/a16, bf16]
  - match: "*"
    formats: [nvfp4, fp8, bf16]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_searchable("qwen3_moe", tmp_path_factory.mktemp("a16") / "model")


def test_every_choice_reads_back_from_its_text():
    for format in all_formats():
        for choice in choices_of(format):
            assert Choice.parse(str(choice)) == choice
    assert str(Choice.parse("nvfp4/a16")) == "nvfp4/max/a16"
    assert str(Choice.parse("nvfp4/a16/mse")) == "nvfp4/mse/a16"
    assert NVFP4_A16.form == "nvfp4/a16"


@pytest.mark.parametrize("text", ["nvfp4/max/mse", "fp8/a16", "bf16/max", "nvfp4/", "int4", ""])
def test_text_that_is_no_choice(text):
    with pytest.raises(ConfigError, match=re.escape(repr(text))):
        Choice.parse(text)


def test_which_choice_keeps_more_of_the_model():
    plain = Choice.parse("nvfp4/mse")
    finer = [(FP8, plain), (BF16, FP8), (BF16, NVFP4_A16), (NVFP4_A16, plain)]
    for one, other in finer:
        assert one.is_finer_than(other)
        assert not other.is_finer_than(one)
    for one, other in ((FP8, NVFP4_A16), (NVFP4_A16, NVFP4), (plain, NVFP4)):
        assert not one.is_finer_than(other)
        assert not other.is_finer_than(one)


def test_inputs_stay_in_bf16_on_every_machine():
    for mode in ActivationMode:
        assert not mode.quantizes_input(NVFP4_A16)
        assert not mode.quantizes_input(BF16)
    assert [mode.quantizes_input(NVFP4) for mode in ActivationMode] == [True, False, False]
    assert [mode.quantizes_input(FP8) for mode in ActivationMode] == [True, True, False]
    assert [Target.of(target.mode) for target in Target] == list(Target)


def test_codes_are_those_of_quantized_inputs(model):
    source = open_source(model)
    group = find_groups(source).groups[0]
    book = CodeBook(FileWeights(source.headers), memory_bytes=2**20)
    one = book.linear(group, group.linears[0], Choice.parse("nvfp4/mse"))
    other = book.linear(group, group.linears[0], NVFP4_A16)
    for name, part in one.parts.items():
        ours, theirs = part.reshape(-1), other.parts[name].reshape(-1)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("layout", Layout)
def test_checkpoint_declares_and_stores_no_input_scale(model, tmp_path, layout):
    source = open_source(model)
    groups = find_groups(source)
    qkv, experts = "model.layers.0.self_attn.qkv", "model.layers.1.mlp.experts"
    everywhere = {group.name: NVFP4 for group in groups if group.role != "head"}
    assignment = Assignment.of(everywhere | {qkv: NVFP4_A16, experts: NVFP4_A16})
    amax = dict.fromkeys((linear.input_scale_set for linear in groups.linears), 2.0)
    target = tmp_path / "out"
    export(source, groups, assignment, amax, target, layout=layout)
    found = verify(target, source)
    assert found.problems == ()
    assert found.linears["nvfp4/a16"] == len(groups[qkv].linears) + len(groups[experts].linears)
    checkpoint = open_quantized(target)
    q = groups[qkv].linears[0].name
    assert checkpoint.choice(q).input == A16
    assert q not in checkpoint.input_scales
    assert not any(name.startswith(q) and "input" in name for name in checkpoint.headers.tensors)
    declared = json.loads((target / "config.json").read_text())["quantization_config"]
    if layout is Layout.MODELOPT:
        expert = groups[experts].linears[0].name
        for name in (q, expert, "model.layers.1.mlp.experts"):
            assert declared["quantized_layers"][name]["quant_algo"] == "W4A16_NVFP4"
        assert declared["quant_algo"] == "MIXED_PRECISION"
    else:
        groups_of = declared["config_groups"].values()
        (own,) = [g for g in groups_of if q in g["targets"]]
        assert own["input_activations"] is None
        assert own["format"] == "nvfp4-pack-quantized"
        assert sum(g["input_activations"] is not None for g in groups_of) == 1


@pytest.mark.parametrize("layout", Layout)
def test_declared_otherwise_than_stored(model, tmp_path, layout):
    """An engine that is told of quantized inputs and finds no scale computes garbage."""
    source = open_source(model)
    groups = find_groups(source)
    assignment = Assignment.of({"model.layers.0.self_attn.qkv": NVFP4_A16})
    amax = dict.fromkeys((linear.input_scale_set for linear in groups.linears), 2.0)
    export(source, groups, assignment, amax, tmp_path / "out", layout=layout)
    config = tmp_path / "out" / "config.json"
    text = config.read_text().replace("W4A16_NVFP4", "NVFP4")
    numbers = '{"num_bits": 4, "type": "float", "dynamic": "local"}'
    config.write_text(text.replace('"input_activations": null', f'"input_activations": {numbers}'))
    with pytest.raises(SourceError, match=r"in NVFP4 without .*input"):
        open_quantized(tmp_path / "out")


@pytest.mark.slow
def test_a_search_uses_and_measures_it(autoquant, model, tmp_path):
    space = tmp_path / "with-a16.yaml"
    space.write_text(SPACE)
    text = save_text(tmp_path / "text")
    shown = json.loads(autoquant("plan", model, "--space", space, "--format", "json").stdout)
    qkv = next(group for group in shown["groups"] if group["role"] == "qkv")
    assert qkv["choices"]["nvfp4/max"] - qkv["choices"]["nvfp4/max/a16"] == 4 * qkv["linears"]
    run = tmp_path / "run"
    flags = ("--space", space, "--calibration", text, *TOKEN_FLAGS, "--trials", 4, "--no-mlflow")
    budget = 1.02 * shown["floor"]["bpe"]["checkpoint"]
    done = autoquant("search", model, "--budget-bpe", budget, "--out", run, *flags)
    assert done.exit_code == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["counts"]["nvfp4/a16"] > 0
    probes = json.loads((run / "sensitivity.json").read_text())["probes"]
    kl = {(p["group"], p["choice"]): p["kl"] for p in probes}
    spared = [kl[g, c] - kl[g, f"{c}/a16"] for g, c in kl if (g, f"{c}/a16") in kl]
    assert spared
    assert sum(spared) > 0  # the inputs were really left alone
    flags = ("--calibration", text, *TOKEN_FLAGS, "--format", "json")
    scored = autoquant("score", model, "--checkpoint", run / "checkpoint", *flags)
    assert json.loads(scored.stdout)["kl"]["mean"] == result["kl"]["mean"]
    assert "BF16 inputs" in (run / "report.html").read_text()
