"""`autoquant verify`."""

import json
import shutil

import pytest
from tiny_models import save_model

from autoquant.export.export import export
from autoquant.formats import FP8, NVFP4
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source


@pytest.fixture
def folders(tmp_path):
    source = open_source(save_model("llama", tmp_path / "source"))
    groups = find_groups(source)
    assignment = Assignment.of(
        {"model.layers.0.self_attn.qkv": NVFP4, "model.layers.1.mlp.down_proj": FP8}
    )
    amax = {linear.input_scale_set: 1.0 for linear in groups.linears}
    export(source, groups, assignment, amax, tmp_path / "out")
    return tmp_path / "out", tmp_path / "source"


def test_sound_checkpoint_exits_0(autoquant, folders):
    checkpoint, source = folders
    result = autoquant("verify", checkpoint, "--source", source)
    assert result.exit_code == 0, result.stderr
    for text in ("3 NVFP4, 1 FP8", "bits per element", "NVFP4 error", "none"):
        assert text in result.stdout


def test_json_of_a_sound_checkpoint(autoquant, folders):
    checkpoint, _ = folders
    result = json.loads(autoquant("verify", checkpoint, "--format", "json").stdout)
    assert (result["ok"], result["problems"]) == (True, [])
    assert result["linears"]["nvfp4"] == 3
    assert result["relative_error"] == {}


@pytest.mark.parametrize("form", ["human", "json"])
def test_damage_is_printed_and_exits_4(autoquant, folders, form):
    checkpoint, _ = folders
    (checkpoint / "hf_quant_config.json").unlink()
    result = autoquant("verify", checkpoint, "--format", form)
    assert result.exit_code == 4
    assert "hf_quant_config.json are both needed" in result.stdout
    assert "is damaged: 1 problems" in result.stderr
    if form == "json":
        assert json.loads(result.stdout)["ok"] is False


def test_checkpoint_that_does_not_exist_exits_4(autoquant, tmp_path):
    result = autoquant("verify", tmp_path / "absent")
    assert result.exit_code == 4
    assert "does not exist" in result.stderr


def test_plain_model_exits_4(autoquant, folders):
    result = autoquant("verify", folders[1])
    assert result.exit_code == 4
    assert result.stdout == ""
    assert f"{folders[1]} holds no quantized weights" in result.stderr
    assert "fix: pass the folder that `autoquant export` or" in result.stderr


def test_export_whose_layers_all_stay_in_bf16_exits_0(autoquant, folders, tmp_path):
    source = open_source(folders[1])
    export(source, find_groups(source), Assignment.of({}), {}, tmp_path / "bf16")
    result = autoquant("verify", tmp_path / "bf16", "--source", folders[1])
    assert result.exit_code == 0, result.stderr
    assert "0 NVFP4, 0 FP8, 15 BF16" in result.stdout


def test_what_cannot_be_told_is_a_note_and_no_damage(autoquant, folders, tmp_path):
    checkpoint = shutil.copytree(folders[0], tmp_path / "older")
    said = json.loads((checkpoint / "autoquant.json").read_text())
    said["source_digest"] = "ab" * 32
    (checkpoint / "autoquant.json").write_text(json.dumps(said))
    result = autoquant("verify", checkpoint, "--source", folders[1])
    assert result.exit_code == 0, result.stderr
    assert "note: autoquant.json names its source by a digest of an earlier" in result.stdout


def test_another_model_is_not_taken_for_damage(autoquant, folders, tmp_path):
    other = save_model("llama", tmp_path / "other", seed=1)
    result = autoquant("verify", folders[0], "--source", other)
    assert result.exit_code == 4
    assert "cannot be held against this model" in result.stderr
    assert "damaged" not in result.stderr
