"""A format that is defined here alone goes through plan, solver and score."""

import json
from fractions import Fraction

import pytest
import torch
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.formats import CODES, SCALE, Choice, Format, Part, registered
from autoquant.formats.packed import Packed

SPACE = """
schema_version: 1
name: with-int8
rules:
  - match: head
    formats: [bf16]
  - match: "*"
    formats: [int8, bf16]
"""


class Int8(Format):
    """Eight-bit integers with one scale a row; inputs in BF16."""

    name = "int8"
    weight_bits = Fraction(8)

    def why_illegal(self, out_features, in_features):
        return "INT8 needs an even K" if in_features % 2 else None

    def parts(self, out_features, in_features, choice):
        return {
            CODES: Part("U8", (out_features, in_features)),
            SCALE: Part("F32", (out_features, 1)),
        }

    def encode(self, weight, choice, statistics):
        scale = weight.float().abs().amax(dim=-1, keepdim=True) / 127
        codes = (weight.float() / scale).round().add(128).to(torch.uint8)
        experts = len(weight) if weight.ndim == 3 else None
        return Packed(choice, {CODES: codes, SCALE: scale}, experts)

    def decode(self, packed, out=None):
        numbers = (packed.parts[CODES].float() - 128) * packed.parts[SCALE]
        return numbers.to(torch.bfloat16) if out is None else out.copy_(numbers)


@pytest.fixture(autouse=True)
def int8():
    with registered(Int8()) as format:
        yield format


def test_it_goes_through_plan_search_and_score(autoquant, tmp_path):
    model = save_searchable("qwen3_moe", tmp_path / "model")
    text, space = save_text(tmp_path / "text"), tmp_path / "with-int8.yaml"
    space.write_text(SPACE)
    shown = json.loads(autoquant("plan", model, "--space", space, "--format", "json").stdout)
    qkv = next(group for group in shown["groups"] if group["role"] == "qkv")
    rows = 64 + 32 + 32
    assert qkv["choices"]["int8"] == rows * 64 + 4 * rows
    budget = 0.7 * shown["floor"]["bpe"]["checkpoint"] + 0.3 * shown["ceiling"]["bpe"]["checkpoint"]
    flags = ("--calibration", text, *TOKEN_FLAGS)
    run = tmp_path / "run"
    done = autoquant(
        "search", model, "--space", space, "--budget-bpe", budget, "--out", run,
        "--trials", 3, "--no-export", "--no-mlflow", *flags,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["counts"]["int8"] > 0
    assert result["counts"]["bf16"] > 1
    assert result["kl"]["mean"] > 0
    assert "INT8" in (run / "report.html").read_text()
    scored = autoquant(
        "score", model, "--assignment", run / "assignment.yaml", "--format", "json", *flags
    )
    assert json.loads(scored.stdout)["kl"]["mean"] == result["kl"]["mean"]


def test_a_layout_without_a_form_refuses_it(autoquant, tmp_path):
    model = save_searchable("llama", tmp_path / "model")
    file = tmp_path / "assignment.yaml"
    file.write_text("schema_version: 1\ngroups: {model.layers.0.mlp.down_proj: int8}\n")
    flags = ("--calibration", save_text(tmp_path / "text"), *TOKEN_FLAGS)
    done = autoquant("export", model, "--assignment", file, "--out", tmp_path / "out", *flags)
    assert done.exit_code == 2, done.stderr
    assert "the layout modelopt has no form for INT8 weights" in done.stderr
    assert not (tmp_path / "out").exists()


def test_it_is_forgotten_with_its_block(int8):
    assert Choice.parse("int8").format is int8
