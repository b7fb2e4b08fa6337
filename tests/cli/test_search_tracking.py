"""A tracking server that dies in the middle of a search."""

import json
import time

import pytest
from mlflow.tracking import MlflowClient
from records import trials_of
from searchable import TOKEN_FLAGS, save_searchable, save_text
from servers import mlflow_server

from autoquant.cli.terminal import Terminal

pytestmark = pytest.mark.slow


def found(run):
    """What a search found, times left out."""
    result = json.loads((run / "result.json").read_text())
    return {name: result[name] for name in ("kl", "bpe", "winner", "baselines", "finalists")}


def test_a_search_outlives_its_tracking_server_and_is_recorded_later(
    autoquant, tmp_path, monkeypatch
):
    model = save_searchable("llama", tmp_path / "model")
    text = save_text(tmp_path / "text")
    store = tmp_path / "store"
    store.mkdir()
    measured = Terminal.trial
    client = MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")

    def recorded() -> list[int]:
        run_id = json.loads((tmp_path / "run" / "tracking.json").read_text())["run_id"]
        return sorted(point.step for point in client.get_metric_history(run_id, "kl"))

    def wait_for_three_trials() -> None:
        deadline = time.monotonic() + 60
        while recorded() != [0, 1, 2]:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def search(out, *flags):
        return autoquant(
            *("search", model, "--budget-bpe", 9.0, "--calibration", text, *TOKEN_FLAGS),
            *("--trials", 4, "--no-export", "--out", out, *flags),
        )

    with mlflow_server(store) as server:

        def die(terminal, trial, best):
            measured(terminal, trial, best)
            if trial.number == 2:
                wait_for_three_trials()
                server.stop()

        monkeypatch.setattr(Terminal, "trial", die)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        done = search(tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("recording in MLflow failed, the search goes on") == 1
    assert "records of this search are not in MLflow; the same command sends them" in done.stderr
    monkeypatch.setattr(Terminal, "trial", measured)
    assert search(tmp_path / "alone", "--no-mlflow").exit_code == 0
    assert found(tmp_path / "run") == found(tmp_path / "alone")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}")
    run_id = json.loads((tmp_path / "run" / "tracking.json").read_text())["run_id"]
    assert client.get_run(run_id).info.status == "RUNNING"
    assert recorded() == [0, 1, 2]
    assert search(tmp_path / "run").exit_code == 0
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["result/kl"] == found(tmp_path / "run")["kl"]["mean"]
    assert recorded() == list(range(len(trials_of(tmp_path / "run"))))
