"""A finished search of a tiny model with its checkpoint, and files of items."""

import json

import pytest
from click.testing import CliRunner
from searchable import TOKEN_FLAGS, WORDS, save_searchable, save_text

from autoquant.cli import cli


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_searchable("llama", tmp_path_factory.mktemp("evaluated") / "model")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("evaluated") / "text", documents=60, words=40)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, model, text):
    """A run with a checkpoint and an MLflow run, which no test changes."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = [
        *("search", model, "--budget-bpe", 9, "--calibration", text, *TOKEN_FLAGS),
        *("--trials", 4, "--out", folder / "run"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.stderr
    return folder / "run"


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def choices(tmp_path_factory):
    """Items with four choices of different lengths."""
    records = [
        {
            "query": f"the {WORDS[i % 10]} of a",
            "choices": [WORDS[(i + k) % 10] * (1 + k % 2) for k in range(4)],
            "gold": i % 4,
        }
        for i in range(12)
    ]
    return write_lines(tmp_path_factory.mktemp("items") / "words.jsonl", records)
