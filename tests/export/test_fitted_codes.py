"""Codes fitted to inputs from a space to a verified checkpoint, and after whatever may be lost."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from exported import change_tensors, load_tensors
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.cli import cli
from autoquant.source.contents import file_digests

SPACE = """\
schema_version: 1
name: fitted
scale_rules: [hessian]
roundings: [gptq]
rules: [{match: [qkv, o, experts, gate_up, down], formats: [FORMAT, bf16]}]
"""
CHOICES = {"nvfp4": "nvfp4/hessian/gptq", "fp8": "fp8/gptq"}


def call(*arguments):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    return done


@pytest.fixture(
    scope="module",
    params=[
        ("llama", "nvfp4"),
        ("llama", "fp8"),
        pytest.param(("qwen3_moe", "nvfp4"), marks=pytest.mark.slow),
        pytest.param(("qwen3_moe", "fp8"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def searched(request, tmp_path_factory):
    """Arguments of a finished search and its run directory, which no test changes."""
    kind, format = request.param
    folder = tmp_path_factory.mktemp(kind)
    (folder / "space.yaml").write_text(SPACE.replace("FORMAT", format))
    model, text = save_searchable(kind, folder / "model"), save_text(folder / "text")
    tokens = ("--calibration", text, *TOKEN_FLAGS, "--calibration-tokens", 1024)
    budget = 11.5 if format == "nvfp4" else 13.5
    arguments = ("search", model, "--space", folder / "space.yaml", "--budget-bpe", budget, *tokens)
    call(*arguments, "--trials", 2, "--no-mlflow", "--out", folder / "run")
    return folder, (*arguments, "--trials", 2, "--no-mlflow"), tokens


@pytest.fixture
def run(searched, tmp_path):
    shutil.copytree(searched[0] / "run", tmp_path / "run")
    return tmp_path / "run"


def fitted(checkpoint):
    said = json.loads((checkpoint / "autoquant.json").read_text()).get("fitted", {})
    assert len(said) <= 1
    assert said.keys() <= {*CHOICES.values()}
    return [name for names in said.values() for name in names]


def verified(checkpoint, model):
    done = CliRunner().invoke(
        cli, ["verify", str(checkpoint), "--source", str(model), "--format", "json"]
    )
    return json.loads(done.stdout)


def test_a_checkpoint_names_its_fitted_linears_and_verify_holds_them(searched, run):
    folder, *_ = searched
    names = fitted(run / "checkpoint")
    assert names
    found = verified(run / "checkpoint", folder / "model")
    assert found["ok"], found["problems"]
    said = f"{len(names)} linears have codes that were fitted to inputs; {{}} of them"
    assert said.format(len(names)) in found["notes"][0]
    shutil.move(run / "checkpoint", run.parent / "elsewhere")
    apart = verified(run.parent / "elsewhere", folder / "model")
    assert apart["ok"]
    assert said.format(0) in apart["notes"][0]


def test_its_kl_is_the_one_that_the_search_gave(searched, run):
    folder, _, tokens = searched
    result = json.loads((run / "result.json").read_text())
    scored = call(
        *("score", folder / "model", "--checkpoint", run / "checkpoint", "--split", "report"),
        *(*tokens, "--format", "json"),
    )
    assert json.loads(scored.stdout)["kl"] == result["kl"]


def test_codes_that_do_more_harm_than_the_nearest_are_found(searched, run):
    folder, *_ = searched
    name = fitted(run / "checkpoint")[0]

    def swap(tensors):
        codes = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = codes.view(torch.uint8).flip(0).view(codes.dtype)

    change_tensors(run / "checkpoint", swap)
    found = verified(run / "checkpoint", folder / "model")
    assert not found["ok"]
    assert any(f"{name}: its codes do" in problem for problem in found["problems"])


def test_linears_that_are_not_named_are_held_to_the_nearest(searched, run):
    folder, *_ = searched
    name = fitted(run / "checkpoint")[0]
    file = run / "checkpoint" / "autoquant.json"
    said = json.loads(file.read_text())
    del said["fitted"]
    file.write_text(json.dumps(said))
    found = verified(run / "checkpoint", folder / "model")
    assert any(f"{name}: " in p and "are not the nearest" in p for p in found["problems"])


@pytest.mark.parametrize("lost", [("codes",), ("statistics",), ("codes", "statistics")])
def test_a_checkpoint_is_made_again_with_the_same_bits(searched, run, lost):
    _, arguments, _ = searched
    before = file_digests([run / "checkpoint" / "model.safetensors"])
    for name in ("checkpoint", *lost):
        shutil.rmtree(run / name)
    call(*arguments, "--out", run)
    assert file_digests([run / "checkpoint" / "model.safetensors"]) == before


@pytest.mark.parametrize("source", ["its run", "statistics", "text"])
def test_an_export_by_itself_has_the_codes_of_the_search(searched, run, source, tmp_path):
    folder, _, tokens = searched
    flags = tokens if source == "text" else ("--calibrated", run / "calibration.json")
    if source == "statistics":
        shutil.rmtree(run / "codes")
    assignment, out = run / "assignment.yaml", tmp_path / "out"
    call("export", folder / "model", "--assignment", assignment, "--out", out, *flags)
    theirs, ours = load_tensors(run / "checkpoint"), load_tensors(out)
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items() if "weight" in name)
    assert fitted(out) == fitted(run / "checkpoint")


def test_without_statistics_an_export_says_what_it_needs(searched, run, tmp_path):
    folder, *_ = searched
    for name in ("codes", "statistics"):
        shutil.rmtree(run / name)
    done = CliRunner().invoke(
        cli,
        [
            *("export", str(folder / "model"), "--assignment", str(run / "assignment.yaml")),
            *("--out", str(tmp_path / "out"), "--calibrated", str(run / "calibration.json")),
        ],
    )
    assert done.exit_code == 4
    assert "holds no whole statistics of the inputs" in done.stderr
    assert not (tmp_path / "out").exists()
