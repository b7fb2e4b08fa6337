"""`autoquant equalize`: the copy computes the same, and its inputs lose less."""

import base64
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from searchable import save_searchable, save_text
from transformers import AutoModelForCausalLM

import autoquant as package
from autoquant.equalize import equalize
from autoquant.equalize.copy import EQUALIZATION
from autoquant.formats import Choice
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

TOKENS = ("--calibration-tokens", 1024, "--sequence-length", 32, "--batch-tokens", 256)


def with_large_channels(folder):
    """Every 16th channel behind a norm or an up projection is 32 times as large as the others."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, own in tensors.items():
            if own.ndim == 1 and "norm" in name and "layers." in name:
                own[::16] = own[::16] * 32 + 8  # some architectures add 1
            elif "up_proj" in name and own.ndim == 2:
                own[::16] *= 32
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return with_large_channels(save_searchable(request.param, folder / "model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text")


def powers_of(site):
    """The exponents of a site in a copy's file."""
    return torch.frombuffer(bytearray(base64.b64decode(site["powers"])), dtype=torch.int8)


def logits(folder, length=40):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = torch.arange(3, 3 + 2 * length).view(2, length)
    with torch.no_grad():
        return loaded(tokens).logits


def kl_of(autoquant, folder, text, tmp_path):
    """Of all linears in the plainest NVFP4, with 4-bit inputs."""
    groups = [g.name for g in find_groups(open_source(folder)) if not g.closed]
    assignment = tmp_path / "assignment.json"
    uniform = Assignment.of(dict.fromkeys(groups, Choice.parse("nvfp4/max")))
    assignment.write_text(json.dumps(uniform.to_dict()))
    given = ("--calibration", text, *TOKENS, "--report-tokens", 4096, "--format", "json")
    result = autoquant("score", folder, "--assignment", assignment, *given)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["kl"]["mean"]


def test_transformers_computes_the_same_and_the_original_is_left_alone(
    model, text, tmp_path, autoquant
):
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    out = tmp_path / "copy"
    result = autoquant("equalize", model, "--calibration", text, *TOKENS, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"autoquant search {out} --budget-bpe 5.0 --calibration {text}" in result.output
    assert torch.equal(logits(model), logits(out))
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    assert {file.name for file in out.iterdir()} == {*before, EQUALIZATION}
    said = json.loads((out / EQUALIZATION).read_text())
    old, new = (load_file(folder / "model.safetensors") for folder in (model, out))
    for site in said["sites"]:
        scale = torch.exp2(powers_of(site).float())
        for name in site["rows"]:
            old[name] = old[name] * scale.view(-1, *[1] * (old[name].ndim - 1))
        for name in site["columns"]:
            old[name] = old[name] / scale
    assert all(torch.equal(old[name].to(own.dtype), own) for name, own in new.items())
    assert any(powers_of(site)[::16].lt(0).any() for site in said["sites"])


@pytest.mark.parametrize(
    "kind", ["mixtral", "minimax_m2", "qwen2_moe", "deepseek_v3", "gpt_oss", "cohere"]
)
def test_architectures_whose_copies_compute_the_same(kind, text, tmp_path, autoquant):
    folder, out = with_large_channels(save_searchable(kind, tmp_path / "model")), tmp_path / "copy"
    result = autoquant("equalize", folder, "--calibration", text, *TOKENS, "--out", out)
    assert result.exit_code == 0, result.output
    assert " 0 of" not in result.output
    assert torch.equal(logits(folder), logits(out))


@pytest.mark.parametrize("kind", ["gemma2", "qwen3_next"])  # their norms multiply by 1 + weight
def test_architectures_whose_copies_would_not_are_refused(kind, text, tmp_path, autoquant):
    folder, out = with_large_channels(save_searchable(kind, tmp_path / "model")), tmp_path / "copy"
    result = autoquant("equalize", folder, "--calibration", text, *TOKENS, "--out", out)
    assert result.exit_code == 4
    assert "computes something else" in result.output
    assert not out.exists()
    given = ("--calibration", text, *TOKENS, "--parts", "down", "--out", out)
    assert autoquant("equalize", folder, *given).exit_code == 0
    assert torch.equal(logits(folder), logits(out))


def test_uniform_nvfp4_is_nearer_to_the_model(model, text, tmp_path, autoquant):
    out = package.equalized_copy(
        model,
        out=tmp_path / "copy",
        calibration=str(text),
        calibration_tokens=1024,
        sequence_length=32,
    )
    own, copy = (kl_of(autoquant, folder, text, tmp_path) for folder in (model, out))
    assert copy < 0.8 * own


def test_a_copy_that_computes_something_else_is_not_written(
    model, text, tmp_path, autoquant, monkeypatch
):
    find = equalize.find_sites

    def without_a_reader(*given):
        return [replace(site, columns=site.columns[1:] or site.columns) for site in find(*given)]

    monkeypatch.setattr(equalize, "find_sites", without_a_reader)
    out = tmp_path / "copy"
    result = autoquant("equalize", model, "--calibration", text, *TOKENS, "--out", out)
    assert result.exit_code == 4
    assert "computes something else" in result.output
    assert "--parts" in result.output
    assert [*tmp_path.iterdir()] == []


def test_parts_are_scaled_alone(model, text, tmp_path, autoquant):
    out = tmp_path / "copy"
    given = ("--calibration", text, *TOKENS, "--parts", "attention", "--format", "json")
    result = autoquant("equalize", model, *given, "--out", out)
    assert result.exit_code == 0, result.output
    sites = json.loads((out / EQUALIZATION).read_text())["sites"]
    assert {site["part"] for site in sites} == {"attention"}
    assert json.loads(result.stdout)["sites"] == len(sites)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--parts", "nonsense"), 2, "none of attention, feed-forward, down"),
        (("--strength", 0), 2, "x>0"),
        (("--strength", 1.5), 2, "x<=1"),
    ],
)
def test_settings_that_are_wrong(model, text, tmp_path, autoquant, options, code, message):
    out = tmp_path / "copy"
    result = autoquant("equalize", model, "--calibration", text, *options, "--out", out)
    assert result.exit_code == code
    assert message in result.output
    assert not out.exists()


def test_a_folder_that_holds_something_is_left_alone(model, text, tmp_path, autoquant):
    (tmp_path / "notes").write_text("mine")
    result = autoquant("equalize", model, "--calibration", text, "--out", tmp_path)
    assert result.exit_code == 5
    assert [file.name for file in tmp_path.iterdir()] == ["notes"]


def test_a_model_that_is_stored_otherwise_is_refused(text, tmp_path, autoquant):
    folder = save_searchable("llama", tmp_path / "model")
    file = folder / "model.safetensors"
    save_file({n: own.float() for n, own in load_file(file).items()}, file, {"format": "pt"})
    out = tmp_path / "copy"
    result = autoquant("equalize", folder, "--calibration", text, *TOKENS, "--out", out)
    assert result.exit_code == 2
    assert "in another form than BF16 (F32)" in result.output
    assert not out.exists()
