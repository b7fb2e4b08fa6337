"""What a search prints for people, and the card of its checkpoint, where the budget counts active
bits.
"""

import json

import pytest
from searchable import TOKEN_FLAGS, save_searchable, save_text


@pytest.mark.slow
def test_active_bits_are_shown_wherever_their_budget_is(autoquant, tmp_path):
    model, text = save_searchable("qwen3_moe", tmp_path / "model"), save_text(tmp_path / "text")
    flags = ("--calibration", text, *TOKEN_FLAGS, "--trials", 0, "--no-mlflow")
    search = ("search", model, "--cost", "active-bytes", *flags)
    many = autoquant(*search, "--budget-bpe", "9,8", "--out", tmp_path / "many")
    assert many.exit_code == 0, many.stderr
    run = tmp_path / "many" / "8bpe"
    result = json.loads((run / "result.json").read_text())
    active, stored = (found["bpe"]["checkpoint"] for found in (result["active"], result))
    header, *rows = many.stdout.splitlines()
    assert header.split()[:6] == ["budget", "active", "bits", "per", "element", "BPE"]
    assert any(row.split()[:3] == ["8", f"{active:.4f}", f"{stored:.4f}"] for row in rows)

    one = autoquant(*search, "--budget-bpe", 8, "--out", run)
    assert one.exit_code == 0, one.stderr
    assert f"At {active:.3f} active bits per element (budget 8; the checkpoint" in one.stdout
    assert f"8 active bits per element, of which it takes {active:.4f}" in one.stdout
    assert "the budget of 8 counts active bits per element, those that one token" in one.stdout
    card = " ".join((run / "checkpoint" / "README.md").read_text().split())
    assert f"budget was 8.0 active bits per element, of which it takes {active:.3f}." in card
    measured = json.loads((run / "checkpoint" / "autoquant.json").read_text())["measured"]
    assert measured["budgeted_bpe"] == active


@pytest.mark.slow
def test_a_budget_of_the_searched_layers_is_shown_with_its_figure(autoquant, tmp_path):
    model, text = save_searchable("llama", tmp_path / "model"), save_text(tmp_path / "text")
    done = autoquant(
        *("search", model, "--calibration", text, *TOKEN_FLAGS, "--trials", 0, "--no-mlflow"),
        *("--budget-bpe", 6, "--budget-scope", "searched", "--out", tmp_path / "run"),
    )
    assert done.exit_code == 0, done.stderr
    bpe = json.loads((tmp_path / "run" / "result.json").read_text())["bpe"]
    assert bpe["searched"] <= 6 < bpe["checkpoint"]
    said = f"At {bpe['searched']:.3f} bits per element of the searched layers (budget 6; the"
    assert f"{said} checkpoint stores {bpe['checkpoint']:.3f}" in done.stdout
    card = " ".join((tmp_path / "run" / "checkpoint" / "README.md").read_text().split())
    assert (
        f"6.0 bits per element of the searched layers, of which it takes {bpe['searched']:.3f}"
        in card
    )
