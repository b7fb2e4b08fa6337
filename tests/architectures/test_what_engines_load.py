"""What plans say of engines that do not load a checkpoint, held against what engines did."""

import json
from pathlib import Path

import pytest
from cells import LAYOUTS
from published import ARCHITECTURES, BLOCK_FP8, save_published
from tracked import ROOT

from autoquant.source.engines.refusals import REFUSED
from autoquant.source.engines.tables import engines

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
