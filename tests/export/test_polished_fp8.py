"""`--effort max` without NVFP4: FP8 groups are polished, exported and held to their codes."""

import json
import shutil

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from exported import change_tensors
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.api import load_run
from autoquant.cli import cli
from autoquant.forward.backward import Backward
from autoquant.report.record import RunRecord
from autoquant.run import polishing
from autoquant.search.confirm import Difference

SPACE = """\
schema_version: 1
name: fp8
rules: [{match: [qkv, o, experts], formats: [fp8, bf16]}]
"""

TABLE = """\
schema_version: 1
unit: microseconds
scale: 1
rows:
  - {role: "*", shape: "*", choice: fp8, cost: 2}
  - {role: "*", shape: "*", choice: fp8/gptq, cost: 1}
  - {role: "*", shape: "*", choice: bf16, cost: 3}
"""
"""Makers of tables know no refitted codes: those take the time of any others."""

pytestmark = pytest.mark.slow


def call(*arguments, code=0):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.stderr
    return " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module", params=["modelopt", "compressed-tensors"])
def searched(request, tmp_path_factory):
    """The model, its tokens, and a run whose polish has won; no test changes them."""
    folder = tmp_path_factory.mktemp("fp8")
    (folder / "space.yaml").write_text(SPACE)
    (folder / "table.yaml").write_text(TABLE)
    model, text = save_searchable("qwen3_moe", folder / "model"), save_text(folder / "text")
    tokens = ("--calibration", text, *TOKEN_FLAGS, "--calibration-tokens", 1024)
    won = Difference(mean=-0.2, low=-0.3, high=-0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polishing, "paired_difference", lambda *_, **__: won)
        call(
            *("search", model, "--space", folder / "space.yaml", "--budget-bpe", 11.5, *tokens),
            *("--trials", 1, "--no-mlflow", "--effort", "max", "--layout", request.param),
            *("--cost-table", folder / "table.yaml", "--cost-limit", 30, "--out", folder / "run"),
        )
    return model, tokens, folder / "run"


def test_every_fp8_group_is_polished_and_scored_as_it_was_measured(searched):
    model, tokens, run = searched
    groups = (run / "assignment.yaml").read_text()
    assert ": fp8/refit" in groups
    assert ": fp8\n" not in groups
    assert ": fp8/gptq" not in groups
    result = json.loads((run / "result.json").read_text())
    assert result["polish"]["exported"] == "polished"
    for limit in result["limits"]:
        assert 0 < limit["total"] <= limit["at_most"]
    assert result["polish"]["plain"]["kl"] != result["polish"]["polished"]["kl"]
    record = RunRecord.read(run)
    assert {own.choice for own in record.groups} == {"fp8/refit", "bf16"}
    assert sum(own.bytes for own in record.groups) < result["checkpoint_bytes"]
    assert pd.isna(load_run(run).baselines().set_index("name")["search_kl"]["the winner"])
    score = ("score", model, "--checkpoint", run / "checkpoint", "--split", "report", *tokens)
    command = [str(argument) for argument in (*score, "--format", "json")]
    assert json.loads(CliRunner().invoke(cli, command).stdout)["kl"] == result["kl"]


def test_verify_holds_them_to_the_codes_that_the_search_kept(searched, tmp_path):
    model, _, finished = searched
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    said = json.loads((run / "checkpoint" / "autoquant.json").read_text())
    assert said["polish"]
    (names,) = said["fitted"].values()
    shown = call("verify", run / "checkpoint", "--source", model)
    assert f"and {len(names)} against the codes that their search kept" in shown

    def change(tensors):
        tensors[f"{names[0]}.weight"].view(torch.uint8)[0, 0] ^= 1

    change_tensors(run / "checkpoint", change)
    shown = call("verify", run / "checkpoint", "--source", model, code=4)
    assert f"{names[0]}: its codes are not those that its search measured and kept" in shown


@pytest.mark.parametrize("choices", ["fp8/nearest, bf16", "fp8, bf16"])
def test_a_polish_of_tokens_that_cannot_be_weighed_says_so_once(tmp_path, choices, monkeypatch):
    def visit(backward, stage):
        raise NotImplementedError("derivative for fused_scan is not implemented")

    monkeypatch.setattr(Backward, "visit", visit)
    model, text = save_searchable("llama", tmp_path / "model"), save_text(tmp_path / "text")
    (tmp_path / "space.yaml").write_text(SPACE.replace("fp8, bf16", choices))
    shown = call(
        *("search", model, "--space", tmp_path / "space.yaml", "--budget-bpe", 15, "--no-export"),
        *("--calibration", text, *TOKEN_FLAGS, "--calibration-tokens", 256, "--trials", 0),
        *("--no-mlflow", "--effort", "max", "--out", tmp_path / "run"),
    )
    assert shown.count("codes that are fitted to inputs take all tokens as equally") == 1
