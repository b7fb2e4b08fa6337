"""A small model, a text and a search of it, for the tests of commands."""

import json

import pytest
from searchable import TOKEN_FLAGS, save_searchable, save_text

BUDGET = 8.5


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="session")
def model(folder):
    return save_searchable("qwen3_moe", folder / "model")


@pytest.fixture(scope="session")
def text(folder):
    """So many documents that the report tokens are from eight or more."""
    return save_text(folder / "text", documents=270, words=20)


@pytest.fixture
def search(autoquant, model, text, tmp_path):
    """Search the model with these flags; the result and the run directory."""

    def call(*flags, out="run", model=model, code=0, budget=BUDGET):
        run = tmp_path / out
        result = autoquant(
            *("search", model, "--budget-bpe", budget, "--calibration", text, *TOKEN_FLAGS),
            *("--trials", 4, "--no-mlflow", "--out", run, *flags),
        )
        assert result.exit_code == code, result.stderr
        return result, run

    return call


@pytest.fixture(scope="session")
def finished(folder, model, text):
    """A finished search with its checkpoint, which no test changes."""
    from click.testing import CliRunner

    from autoquant.cli import cli

    arguments = [
        *("search", model, "--budget-bpe", BUDGET, "--calibration", text, *TOKEN_FLAGS),
        *("--trials", 8, "--no-mlflow", "--out", folder / "run", "--format", "json"),
    ]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.stderr
    return folder / "run", json.loads(result.stdout)
