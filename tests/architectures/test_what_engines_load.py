"""What plans say of engines that do not load a checkpoint, held against what engines did."""

import json
import re
from pathlib import Path

import pytest
from cells import LAYOUTS
from published import ARCHITECTURES, BLOCK_FP8, save_published
from tracked import ROOT

from autoquant.export.declaration import quantized_linears
from autoquant.export.layouts import compressed_tensors, modelopt
from autoquant.formats import FP8, NVFP4
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.engines.refusals import REFUSED
from autoquant.source.engines.tables import engines
from autoquant.source.source import open_source

RESULTS = ROOT / "experiments" / "architectures" / "results"
KINDS = (*ARCHITECTURES, *(f"{kind}-fp8" for kind in BLOCK_FP8))


def cells(kind: str, *said: str) -> set[str]:
    """Columns of an engine and a layout whose cell in the row of the experiment begins so."""
    found = json.loads((RESULTS / f"{kind}.json").read_text())["cells"]
    names = {f"{engine} {layout}" for engine in ("vLLM", "SGLang") for layout in LAYOUTS}
    return {name for name in names if found.get(name, "").startswith(said)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_names_the_engines_that_did_not_load_the_checkpoint(kind, autoquant, tmp_path):
    result = autoquant("plan", save_published(kind, tmp_path / "model"), "--format", "json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    refused = {
        f"{own['engine'].partition(' ')[0]} {layout}"
        for own in plan["refused_by"]
        for layout in own["layouts"]
    }
    assert cells(kind, "fails", "if ") <= refused
    assert refused.isdisjoint(cells(kind, "ok"))
    for own in plan["refused_by"]:
        assert f"{own['engine']} is not known to load" in result.stderr
        assert own["why"] in result.stderr


def test_no_refusal_that_running_showed_has_a_row_that_loads():
    for entry in json.loads(REFUSED.read_text())["refused"]:
        assert f"{entry['engine']} {entry['version']}" in engines()
        named = {f"{entry['engine']} {layout}" for layout in entry["layouts"]}
        assert Path(RESULTS / f"{entry['model_type']}.json").exists(), entry
        assert named.isdisjoint(cells(entry["model_type"], "ok")), entry


def test_an_engine_that_fails_names_a_way_that_it_or_the_other_reads(autoquant, tmp_path):
    result = autoquant("plan", save_published("kimi_linear", tmp_path / "kimi"))
    [vllm] = (line for line in result.stderr.splitlines() if "known to load" in line)
    assert vllm.startswith("warning: vLLM 0.33.0 is not known to load")
    assert "this model in the layout compressed-tensors: it takes packed weights for" in vllm
    ways = "by a search space, or write it with --layout modelopt, or serve it with SGLang 0.5.23."
    assert vllm.endswith(ways)
    result = autoquant("plan", save_published("gpt_oss", tmp_path / "gpt"))
    [sglang] = (line for line in result.stderr.splitlines() if "known to load" in line)
    assert "this model, in either layout: it builds attention without a quantization" in sglang
    assert sglang.endswith(". Serve it with vLLM 0.33.0.")


def test_deepseek_v4_is_declared_as_sglang_holds_it(tmp_path):
    source = open_source(save_published("deepseek_v4", tmp_path / "source"))
    groups = find_groups(source)
    names = ("layers.0.ffn.experts", "layers.0.attn.fused_wqa_wkv", "layers.0.attn.wo_b")
    mixed = dict.fromkeys(names, FP8) | {"layers.0.attn.wq_b": NVFP4}
    linears = quantized_linears(groups, Assignment.of(mixed))
    flat, _ = modelopt.quantization_files(source.headers, groups, linears)
    config = compressed_tensors.quantization_config(source.headers, groups, linears)
    fp8, _ = config["config_groups"].values()
    quantized = ("self_attn.wqkv_a", "self_attn.wo_b", "mlp.shared_experts.down_proj")
    for name in (f"model.layers.0.{part}" for part in quantized):
        assert flat["quantized_layers"][name]["quant_algo"] == "FP8"
        assert name in fp8["targets"]
    assert "model.layers.0.mlp.experts" in flat["quantized_layers"]
    asked = "mlp.experts.0.gate_proj"
    expressions = [name[3:] for name in fp8["targets"] if name.startswith("re:")]
    assert any(re.match(own, f"model.layers.0.{asked}") for own in expressions)
    for ignored in (flat["ignore"], config["ignore"]):
        assert {"model.layers.1.self_attn.wo_b", "model.layers.1.mlp.experts"} < {*ignored}
    assert f"model.layers.1.{asked}" in config["ignore"]
