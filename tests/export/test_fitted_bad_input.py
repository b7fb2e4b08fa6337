"""Inputs that codes cannot be fitted to: never worse than codes of the weight alone, and named."""

import json

import pytest
from click.testing import CliRunner
from exported import change_tensors
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.cli import cli
from autoquant.formats.moments import FEWEST_TOKENS
from autoquant.report.html import write_report
from autoquant.report.record import RunRecord

SPACE = """\
schema_version: 1
name: fitted
rules:
  - {match: model.layers.0.self_attn.o_proj, formats: [CHOICE, fp8/nearest, bf16]}
  - {match: [qkv, o, experts, gate_up, down], formats: [CHOICE]}
"""


def call(*arguments):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    return done


@pytest.fixture(params=["nvfp4/hessian/gptq", "fp8/gptq"])
def searched(request, tmp_path):
    """Search a changed model, verify its checkpoint, and return the result."""
    (tmp_path / "space.yaml").write_text(SPACE.replace("CHOICE", request.param))
    text = save_text(tmp_path / "text")

    def search(kind, change=lambda tensors: None, *, calibration_tokens=1024, **settings):
        model, run = save_searchable(kind, tmp_path / "model", **settings), tmp_path / "run"
        change_tensors(model, change)
        tokens = ("--calibration", text, *TOKEN_FLAGS, "--calibration-tokens", calibration_tokens)
        search.said = call(
            *("search", model, "--space", tmp_path / "space.yaml", "--budget-bpe", 12, *tokens),
            *("--trials", 0, "--no-mlflow", "--probe", "exact", "--out", run),
        ).stderr
        found = call("verify", run / "checkpoint", "--source", model, "--format", "json")
        result = json.loads((run / "result.json").read_text())
        fitted = result["fitted"]["linears"] - len(result["fitted"]["plain"])
        if fitted:
            note = json.loads(found.stdout)["notes"][0]
            assert f"{fitted} linears have codes that were fitted to inputs; {fitted} of" in note
        assert result["kl"]["mean"] < 10
        return result, run

    return search


def page_of(run):
    return write_report(RunRecord.read(run)).read_text()


@pytest.mark.slow
def test_dead_channels_and_a_weight_of_zeros(searched):
    def change(tensors):
        tensors["model.layers.0.input_layernorm.weight"][16:40] = 0.0
        tensors["model.layers.1.mlp.down_proj.weight"].zero_()

    result, run = searched("llama", change)
    plain = result["fitted"]["plain"]
    assert "model.layers.1.mlp.down_proj" not in plain, "nothing does no harm"
    assert "gradients say nothing of 1 of 8 inputs, such as model.layers.1.mlp" in searched.said
    assert "linears have codes fitted to inputs" in page_of(run)


@pytest.mark.slow
def test_one_sequence_fits_nothing(searched):
    result, run = searched("llama", calibration_tokens=32)
    plain = result["fitted"]["plain"]
    assert len(plain) == result["fitted"]["linears"]
    (reason,) = set(plain.values())
    assert reason == f"calibration showed it fewer than {FEWEST_TOKENS} tokens"
    assert f"codes of the weight alone have {len(plain)} because" in page_of(run)


@pytest.mark.slow
def test_fewer_tokens_than_channels(searched):
    result, _ = searched("llama", calibration_tokens=96, intermediate_size=256)
    assert result["fitted"]["linears"] in (13, 14)
    assert len(result["fitted"]["plain"]) < result["fitted"]["linears"]


@pytest.mark.slow
def test_an_expert_that_no_token_reaches_is_named(searched):
    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith("mlp.gate.weight"):
                tensor[1] = -tensor[0]
                tensor[2:].zero_()

    result, _ = searched("qwen3_moe", change, num_experts_per_tok=1)
    plain = result["fitted"]["plain"]
    unseen = {name for name, why in plain.items() if why == "calibration showed it no tokens"}
    assert {name.partition("experts.")[2][0] for name in unseen} == {"2", "3"}
    assert len(unseen) == 2 * 2 * 3


@pytest.mark.slow
def test_a_width_that_16_does_not_divide(searched):
    """Closed to NVFP4; FP8 fits its codes as those of any other."""
    result, run = searched("llama", intermediate_size=72)
    assert not result["fitted"]["plain"].keys() & {
        f"model.layers.{layer}.mlp.down_proj" for layer in range(2)
    }
    said = json.loads((run / "checkpoint" / "autoquant.json").read_text())["fitted"]
    widths = {name.rpartition(".")[2] for name in said.get("fp8/gptq", ())}
    is_fp8 = "down_proj: fp8/gptq" in (run / "assignment.yaml").read_text()
    assert ("down_proj" in widths) is is_fp8
