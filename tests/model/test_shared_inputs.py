"""What names say about shared inputs, held against a forward."""

import dataclasses

import pytest
import torch
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.measure.scorer import Scorer
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.model.shared_inputs import input_disagreements
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.grouping import find_groups
from autoquant.source import names as table
from autoquant.source.source import open_source

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 11)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_searchable("llama", tmp_path_factory.mktemp("llama") / "model")


def disagreements(folder, groups):
    model = load_model(folder, CPU).model
    quantized = QuantizedModel(model, groups, mode=ActivationMode.W4A4)
    return input_disagreements(quantized, lambda: Scorer(quantized, CPU).forward([TOKENS]))


def in_one_set(group, name, *others):
    """The group with the input scale set `name` for its own linears and those of others."""
    linears = [linear for own in (group, *others) for linear in own.linears]
    shared = tuple(dataclasses.replace(linear, input_scale_set=name) for linear in linears)
    return dataclasses.replace(group, linears=shared)


def test_names_and_forward_agree_on_a_real_model(folder):
    assert disagreements(folder, find_groups(open_source(folder))) == ()


def test_linears_joined_by_name_that_read_different_tensors_are_named(folder):
    groups = find_groups(open_source(folder)).by_name
    qkv, output = (groups[f"model.layers.1.self_attn.{name}"] for name in ("qkv", "o_proj"))
    (line,) = disagreements(folder, [in_one_set(qkv, qkv.name, output)])
    assert line.startswith("model.layers.1.self_attn.qkv: by their names k_proj, q_proj, v_proj, ")
    assert "o_proj are one matrix in engines, and in a forward they read different tensors" in line


def test_linears_that_read_one_tensor_and_are_apart_by_name_warn_in_a_search(
    folder, autoquant, tmp_path, monkeypatch
):
    apart = tuple(table.Fused(p, "qkv", (p,), p) for p in ("q_proj", "k_proj", "v_proj"))
    monkeypatch.setattr(table, "FUSED", (*apart, *table.FUSED[1:]))
    monkeypatch.setattr("autoquant.plan.grouping.engine_tables", lambda *configs: ())
    monkeypatch.setattr("autoquant.report.html.write_report", lambda record: None)
    text = save_text(tmp_path / "text")
    result = autoquant(
        *("search", folder, "--budget-bpe", 12, *TOKEN_FLAGS, "--calibration", text),
        *("--trials", 0, "--no-mlflow", "--no-export", "--out", tmp_path / "run"),
    )
    assert result.exit_code == 0, result.stderr
    for layer in (0, 1):
        names = [f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkv"]
        assert all(name in result.stderr for name in names)
    assert "in a forward they read the same tensor" in result.stderr
