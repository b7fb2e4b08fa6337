"""What commands say, before they read a weight, of engines that do not load what they make."""

import json

import pytest
from searchable import TOKEN_FLAGS, save_searchable

from autoquant.errors import SourceError

SAID = "is not known to load a quantized checkpoint of this model"


def said(result):
    return [line for line in result.stderr.splitlines() if SAID in line]


@pytest.fixture
def unread(monkeypatch):
    """A search ends where it would read weights."""

    def refuse(*_):
        raise SourceError("weights are read.", fix="not in this test.")

    monkeypatch.setattr("autoquant.run.sensitivity.probing.open_to_probe", refuse)


@pytest.fixture
def searched(autoquant, text, tmp_path, unread):
    def call(model, *flags):
        result = autoquant(
            *("search", model, "--budget-bpe", 12, "--calibration", text, *TOKEN_FLAGS),
            *("--no-mlflow", "--out", tmp_path / "run", "--fresh", *flags),
        )
        assert "weights are read" in result.stderr
        return said(result)

    return call


def test_an_engine_that_was_seen_to_fail_is_named_with_the_other_one(autoquant, searched, tmp_path):
    model = save_searchable("gemma2", tmp_path / "gemma2")
    (line,) = said(autoquant("plan", model))
    assert line == (
        f"warning: SGLang 0.5.23 {SAID}, in either layout: it looks up linears as "
        "`self_attn.qkv_proj`, without the number of the layer. Give all layers the "
        "same formats by a search space, or serve it with vLLM 0.33.0."
    )
    assert searched(model, "--layout", "modelopt") == [line]
    assert searched(model, "--layout", "compressed-tensors") == [line]
    found = json.loads(autoquant("plan", model, "--format", "json").stdout)
    (own,) = found["refused_by"]
    assert own["layouts"] == ["modelopt", "compressed-tensors"]


def test_one_layout_that_fails_is_no_warning_for_a_search_in_the_other(
    autoquant, searched, tmp_path
):
    model = save_searchable("glm4_moe", tmp_path / "glm4")
    (line,) = said(autoquant("plan", model))
    assert f"SGLang 0.5.23 {SAID} in the layout compressed-tensors: " in line
    assert line.endswith(
        ". Keep shared experts in FP8 or BF16 by a search space, or write it with --layout "
        "modelopt, or serve it with vLLM 0.33.0."
    )
    assert searched(model) == []
    assert searched(model, "--layout", "compressed-tensors") == [line]


def test_a_space_that_keeps_what_an_engine_does_not_load_ends_the_warning(autoquant, tmp_path):
    model = save_searchable("glm4_moe", tmp_path / "glm4")
    space = tmp_path / "mine.yaml"
    for role, formats, warned in (
        ("experts", "nvfp4, fp8", 1),
        ("experts", "fp8, bf16", 0),
        ("qkv", "nvfp4", 0),
    ):
        rule = f"{{match: {role}, formats: [{formats}]}}"
        space.write_text(f"schema_version: 1\nname: mine\nrules:\n  - {rule}\n")
        assert len(said(autoquant("plan", model, "--space", space))) == warned


def test_an_engine_without_the_architecture_is_named(autoquant, tmp_path):
    model = save_searchable("olmo_hybrid", tmp_path / "olmo")
    (line,) = said(autoquant("plan", model))
    assert line == (
        f"warning: SGLang 0.5.23 {SAID}, in either layout: it has no model OlmoHybridForCausalLM "
        "of its own. Serve it with vLLM 0.33.0."
    )
    file = model / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"architectures": ["HouseMade"]}))
    vllm, _ = said(autoquant("plan", model))
    assert "vLLM 0.33.0" in vllm
    assert "it has no model HouseMade of its own" in vllm
    assert vllm.endswith("`autoquant score MODEL --checkpoint DIR` runs it without an engine.")
    del config["architectures"]
    file.write_text(json.dumps(config))
    assert said(autoquant("plan", model)) == [line]


def test_nothing_is_said_of_what_stays_as_it_is(autoquant, tmp_path):
    model = save_searchable("gemma2", tmp_path / "gemma2")
    space = tmp_path / "closed.yaml"
    rule = '{match: "*", formats: [bf16]}'
    space.write_text(f"schema_version: 1\nname: closed\nrules:\n  - {rule}\n")
    assert said(autoquant("plan", model, "--space", space)) == []


@pytest.mark.slow
def test_an_export_warns_of_its_layout_and_its_card_says_so(autoquant, text, tmp_path):
    model = save_searchable("glm4_moe", tmp_path / "glm4")
    groups = json.loads(autoquant("plan", model, "--format", "json").stdout)["groups"]

    def exported(layout, choice):
        chosen = {g["name"]: choice for g in groups if choice in g["choices"]}
        mix = tmp_path / "mix.json"
        mix.write_text(json.dumps({"schema_version": 1, "groups": chosen}))
        out = tmp_path / f"{layout}-{choice[:3]}"
        flags = ("--layout", layout, "--calibration", text, *TOKEN_FLAGS)
        result = autoquant("export", model, "--assignment", mix, "--out", out, *flags)
        assert result.exit_code == 0, result.stderr
        return said(result), (out / "README.md").read_text()

    (line,), card = exported("compressed-tensors", "nvfp4/mse")
    assert "SGLang 0.5.23" in line
    assert "Not known to load in:\n\n- SGLang 0.5.23: it asks a shared expert" in card
    for layout, choice in (("modelopt", "nvfp4/mse"), ("compressed-tensors", "fp8")):
        lines, card = exported(layout, choice)
        assert lines == []
        assert "Not known to load in" not in card
