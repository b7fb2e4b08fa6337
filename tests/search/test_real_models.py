"""Searches of small trained models, where a checkout has them beside it."""

import json
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[3] / "shared" / "models"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "babyllama"])
def test_a_trained_model_is_searched_exported_and_verified(name, autoquant, tmp_path):
    model = MODELS / name
    if not model.is_dir():
        pytest.skip(f"no trained model at ../shared/models/{name}")
    floor = json.loads(autoquant("plan", model, "--format", "json").stdout)["floor"]
    budget = round(floor["bpe"]["checkpoint"] + 1.0, 2)
    tokens = ("--calibration-tokens", 512, "--search-tokens", 512, "--report-tokens", 2048)
    text = ("--calibration", "stdlib", *tokens, "--sequence-length", 128)
    result = autoquant(
        *("search", model, "--budget-bpe", budget, *text),
        *("--trials", 4, "--no-mlflow", "--out", tmp_path / "run", "--format", "json"),
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    kl = {row["name"]: row["kl"] for row in found["baselines"]}
    assert found["noise_floor"] < kl["uniform fp8"] < found["kl"]["mean"] < kl["uniform nvfp4"]
    verified = autoquant("verify", tmp_path / "run" / "checkpoint", "--source", model)
    assert verified.exit_code == 0, verified.stdout
