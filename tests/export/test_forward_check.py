"""`verify --forward`: faults that scoring, export and verify agree on, since they share them."""

import json

import pytest
import torch
from searchable import save_searchable
from tiny_models import change_tensors

from autoquant.errors import SourceError
from autoquant.formats import FP8, NVFP4
from autoquant.independent.forward import Evidence, run_checkpoint
from autoquant.independent.products import Products
from autoquant.model.live import uses_of
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.grouping import find_groups
from autoquant.run import independent as checking
from autoquant.source.source import open_source
from autoquant.source.tensors import TORCH_DTYPES

TOKENS = (
    *("--calibration", "stdlib", "--sequence-length", 64, "--batch-tokens", 1024),
    *("--calibration-tokens", 1024, "--search-tokens", 256),
)


@pytest.fixture
def exported(tmp_path, autoquant, monkeypatch):
    """Export a model with every second open group in NVFP4 and the rest in FP8, or `only` some in
    NVFP4; unchecked right after it or not."""

    def export(kind, *arguments, **how):
        return run(save_searchable(kind, tmp_path / "source"), *arguments, **how)

    def run(source, *arguments, unchecked=False, only=""):
        if unchecked:
            monkeypatch.setattr("autoquant.run.single.check_export", lambda *_: None)
        groups = [own for own in find_groups(open_source(source)) if not own.closed]
        named = [own.name for own in groups if only in own.name]
        choices = {name: "nvfp4" if only or i % 2 == 0 else "fp8" for i, name in enumerate(named)}
        assignment = tmp_path / "assignment.json"
        assignment.write_text(json.dumps({"schema_version": 1, "groups": choices}))
        out = tmp_path / "out"
        done = autoquant(
            *("export", source, "--assignment", assignment, "--out", out, *TOKENS, *arguments)
        )
        return source, out, done

    export.run = run
    return export


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize(
    "kind", ["llama", "qwen3_moe", "qwen3_vl_moe", "gemma2", "falcon", "hrm_text"]
)
def test_a_right_export_is_confirmed(exported, autoquant, kind, layout):
    source, out, done = exported(kind, "--layout", layout)
    assert done.exit_code == 0, done.stderr
    assert "not run" not in done.stderr
    assert "in no product" not in done.stderr
    found = autoquant("verify", out, "--source", source, "--forward", "--format", "json")
    assert found.exit_code == 0, found.stderr
    forward = json.loads(found.stdout)["forward"]
    assert forward["said"] > 1e-4
    assert forward["kl"] == pytest.approx(forward["said"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_two_blocks_that_an_engine_looks_up_under_one_name(exported, autoquant, tmp_path, layout):
    source = save_searchable("zamba2", tmp_path / "source", num_mem_blocks=2)
    _, out, done = exported.run(source, "--layout", layout)
    assert done.exit_code == 0, done.stderr
    found = autoquant("verify", out, "--source", source, "--forward", "--format", "json")
    forward = json.loads(found.stdout)["forward"]
    assert forward["kl"] == pytest.approx(forward["said"], rel=0.05)


def disagrees(autoquant, source, out):
    """Plain verify finds nothing, and the forward does."""
    assert autoquant("verify", out, "--source", source).exit_code == 0
    found = autoquant("verify", out, "--source", source, "--forward")
    assert found.exit_code == 4
    return found.stderr


def last_use(model, slots):
    """Only the last of the layers that share each weight, which changes the KL forty times."""
    return {name: layers[-1:] for name, layers in uses_of(model, slots).items()}


@pytest.mark.slow
def test_a_hook_that_misses_uses_of_a_shared_weight(exported, autoquant, monkeypatch):
    monkeypatch.setattr("autoquant.model.live.uses_of", last_use)
    source, out, done = exported("zamba2", unchecked=True, only="shared_transformer")
    assert done.exit_code == 0, done.stderr
    assert "does not compute what was measured" in disagrees(autoquant, source, out)


@pytest.mark.slow
def test_a_table_of_targets_that_leaves_inputs_alone(exported, autoquant, monkeypatch):
    monkeypatch.setattr(ActivationMode, "quantizes_input", lambda self, choice: False)
    source, out, done = exported("llama", unchecked=True)
    assert done.exit_code == 0, done.stderr
    assert "does not compute what was measured" in disagrees(autoquant, source, out)


@pytest.mark.slow
def test_a_reader_that_takes_float16_for_bfloat16(exported, autoquant, monkeypatch, tmp_path):
    source = save_searchable("llama", tmp_path / "source", dtype="float16")
    monkeypatch.setitem(TORCH_DTYPES, "F16", torch.bfloat16)
    source, out, done = exported.run(source, unchecked=True)
    assert done.exit_code == 0, done.stderr
    assert "does not compute what was measured" in disagrees(autoquant, source, out)


@pytest.mark.slow
def test_an_export_that_does_not_compute_what_was_measured_is_an_error(
    exported, autoquant, monkeypatch
):
    monkeypatch.setattr("autoquant.model.live.uses_of", last_use)
    _, _, done = exported("zamba2", only="shared_transformer")
    assert done.exit_code == 4
    assert "does not compute what was measured" in done.stderr


@pytest.mark.slow
def test_other_codes_and_linears_that_nothing_multiplies_with_are_seen(exported, monkeypatch):
    source, out, done = exported("llama")
    assert done.exit_code == 0, done.stderr
    evidence = Evidence.of(json.loads((out / "autoquant.json").read_text())["forward"])
    cpu = torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(Products, "_names", lambda self, weight: [])
        unused = run_checkpoint(out, source, evidence, device=cpu).note
    assert "quantized linears took part in no product" in unused

    codes = "model.layers.1.self_attn.v_proj.weight"
    change_tensors(out, lambda tensors: tensors.update({codes: torch.zeros_like(tensors[codes])}))
    found = run_checkpoint(out, source, evidence, device=cpu)
    assert found.note is None
    assert found.problem is not None
    assert found.kl > found.said + found.allowed


def test_what_cannot_be_run_is_a_note(monkeypatch, tmp_path):
    notes = []
    monkeypatch.setattr(checking, "_free_bytes", lambda device: 10)
    source = open_source(save_searchable("llama", tmp_path / "source"))
    evidence = Evidence(sequences=((1, 2),), kl=(0.1,), activation_mode="w4a4", kv_cache="bf16")
    observer = type("Observer", (), {"note": lambda self, text: notes.append(text)})()
    cpu = torch.device("cpu")
    assert checking.check_export(tmp_path, source, evidence, cpu, observer) is None
    assert "10 are free" in notes[0]


@pytest.mark.parametrize("mode", ActivationMode)
def test_which_inputs_are_rounded(mode):
    evidence = Evidence(sequences=(), kl=(), activation_mode=str(mode), kv_cache="bf16")
    for choice in (NVFP4, FP8):
        assert evidence.rounds(choice.format.input_bits) == mode.quantizes_input(choice)


def test_a_damaged_measurement_is_refused():
    with pytest.raises(SourceError, match="damaged measurement"):
        Evidence.of({"sequences": [[1, 2]]})


def test_forward_needs_a_source_and_a_measurement(autoquant, tmp_path):
    done = autoquant("verify", tmp_path, "--forward")
    assert done.exit_code == 2
    assert "--forward without --source" in done.stderr
