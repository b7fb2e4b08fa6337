"""`--effort max`: the winner and its polish meet, and the better one is exported and kept."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from exported import change_tensors
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.cli import cli
from autoquant.run import polishing
from autoquant.search.confirm import Difference
from autoquant.source.contents import file_digests

GAIN = Difference(mean=-0.2, low=-0.3, high=-0.1)
LOSS = Difference(mean=-0.2, low=-0.3, high=0.1)


def call(*arguments, code=0):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.stderr
    return done


slow = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("max")
    return save_searchable("qwen3_moe", folder / "model"), save_text(folder / "text")


@pytest.fixture(scope="module")
def flags(place):
    model, text = place
    tokens = ("--calibration", text, *TOKEN_FLAGS, "--calibration-tokens", 1024)
    limits = ("--budget-bpe", 9, "--trials", 1, "--no-mlflow", "--effort", "max")
    return model, tokens, ("search", model, *limits, *tokens)


@pytest.fixture(scope="module", params=[GAIN, LOSS], ids=["gain", "no gain"])
def searched(request, flags, tmp_path_factory):
    """Whether the polish won, and the run; no test changes it."""
    run = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polishing, "paired_difference", lambda *_, **__: request.param)
        shown = call(*flags[2], "--out", run).stdout
    return request.param is GAIN, run, shown


def result_of(run):
    return json.loads((run / "result.json").read_text())


def said_of(run):
    return json.loads((run / "checkpoint" / "autoquant.json").read_text())


@slow
def test_the_better_one_is_exported_and_everything_says_so(searched):
    won, run, shown = searched
    result = result_of(run)
    found = result["polish"]
    exported = "polished" if won else "plain"
    assert found["exported"] == exported
    assert found["plain"]["kl"] != found["polished"]["kl"]
    assert (result["kl"]["mean"], result["kl"]["stderr"]) == (
        found[exported]["kl"],
        found[exported]["stderr"],
    )
    assert ("/refit" in (run / "assignment.yaml").read_text()) is won
    card = (run / "checkpoint" / "README.md").read_text()
    assert f"the same {'without' if won else 'with'} refitted codes" in card
    for page in (shown, (run / "report.html").read_text()):
        assert f"the {exported} assignment is exported" in " ".join(page.split())
        for which in ("plain", "polished"):
            assert f"{found[which]['kl']:.5f} ± {found[which]['stderr']:.5f}" in page
        assert "95 % interval from -0.30000 to" in " ".join(page.split())


@slow
def test_the_checkpoint_is_the_one_that_was_measured(searched, flags):
    won, run, _ = searched
    model, tokens, _ = flags
    command = ("score", model, "--checkpoint", run / "checkpoint", "--split", "report", *tokens)
    scored = json.loads(call(*command, "--format", "json").stdout)
    assert scored["kl"] == result_of(run)["kl"]
    assert result_of(run)["forward"] is not None
    found = call("verify", run / "checkpoint", "--source", model)
    linears = sum(map(len, said_of(run)["fitted"].values()))
    assert f"and {linears} against the codes that their search kept" in " ".join(
        (found.stdout + found.stderr).split()
    )
    assert (said_of(run).get("polish") == result_of(run)["polish"]["key"]) is won


@slow
def test_codes_that_the_search_did_not_keep_are_found(searched, flags, tmp_path):
    _, finished, _ = searched
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    name = next(iter(said_of(run)["fitted"].values()))[0]

    def change(tensors):
        tensors[f"{name}.weight"].view(torch.uint8)[0, 0] ^= 1

    change_tensors(run / "checkpoint", change)
    found = call("verify", run / "checkpoint", "--source", flags[0], code=4)
    shown = " ".join((found.stdout + found.stderr).split())
    assert f"{name}: its codes are not those that its search measured and kept" in shown


@slow
@pytest.mark.parametrize("lost", [(), ("codes",), ("statistics", "codes")])
def test_a_checkpoint_is_made_again_with_the_same_bits(searched, flags, lost, tmp_path):
    _, finished, _ = searched
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = file_digests([run / "checkpoint" / "model.safetensors"])
    for name in ("checkpoint", *lost):
        shutil.rmtree(run / name)
    call(*flags[2], "--out", run)
    assert file_digests([run / "checkpoint" / "model.safetensors"]) == before


@slow
def test_refitted_codes_are_exported_from_their_run_and_nowhere_else(searched, flags, tmp_path):
    won, run, _ = searched
    model, tokens, _ = flags
    export = ("export", model, "--assignment", run / "assignment.yaml", "--out", tmp_path / "out")
    call(*export, "--calibrated", run / "calibration.json")
    name = "model.safetensors"
    assert file_digests([tmp_path / "out" / name])[name] == said_of(run)["sha256"][name]
    if not won:
        return
    asked = ("--assignment", run / "assignment.yaml", *tokens)
    for command in (("score", model), ("export", model, "--out", tmp_path / "other")):
        done = call(*command, *asked, code=2)
        assert "names refitted codes" in done.stderr
        assert not done.stderr.startswith("load")


def test_no_search_space_opens_refitted_codes(place, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text(
        "schema_version: 1\nname: s\nrules: [{match: '*', formats: [nvfp4/mse/refit, bf16]}]"
    )
    done = call("plan", place[0], "--space", space, code=2)
    assert "nvfp4/mse/refit" in done.stderr
