import json
import shutil
from pathlib import Path

import pytest
from records import forget_checksums, trials_of, write_trials
from searchable import TOKEN_FLAGS, save_searchable, save_text

import autoquant


@pytest.fixture(scope="session")
def settings(tmp_path_factory) -> dict:
    """Arguments of a quick search of a tiny mixture of experts."""
    folder = tmp_path_factory.mktemp("searchable")
    flags = dict(zip(TOKEN_FLAGS[::2], TOKEN_FLAGS[1::2], strict=True))
    return {
        "model": save_searchable("qwen3_moe", folder / "model"),
        "calibration": str(save_text(folder / "text")),
        "budget_bpe": 9.0,
        "trials": 4,
        "mlflow": False,
        "export": False,
        **{flag.lstrip("-").replace("-", "_"): value for flag, value in flags.items()},
    }


@pytest.fixture(scope="session")
def finished(settings, tmp_path_factory) -> Path:
    """A finished run; read only."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return autoquant.search(**settings, out=out).path


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run as an earlier version left it, to be changed."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    forget_checksums(run)
    write_trials(run, trials_of(run))
    return run


@pytest.fixture
def interrupted(run) -> Path:
    """The run as an interruption in the middle of its trials leaves it."""
    for name in ("result.json", "tokens.json", "assignment.yaml", "report.html"):
        (run / name).unlink()
    lines = (run / "trials.jsonl").read_text().splitlines(keepends=True)
    (run / "trials.jsonl").write_text("".join(lines[:-2]))
    identity = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(identity | {"status": "interrupted"}))
    return run


@pytest.fixture(scope="session")
def html(finished) -> str:
    return (finished / "report.html").read_text()
