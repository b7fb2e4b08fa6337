"""What follows from a result is completed by the same command, and nothing is recorded twice."""

import os

import pytest
from mlflow.tracking import MlflowClient
from searchable import TOKEN_FLAGS, save_searchable, save_text

FEW = (*TOKEN_FLAGS, "--trials", 1)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("again")
    save_searchable("llama", folder / "model", num_hidden_layers=1)
    text = save_text(folder / "text", documents=12)
    return ("search", folder / "model", "--budget-bpe", 11, "--calibration", text, *FEW)


@pytest.mark.slow
def test_a_report_that_is_missing_cut_or_older_than_its_result_is_made(given, autoquant, tmp_path):
    run = tmp_path / "run"
    call = (*given, "--out", run, "--no-mlflow", "--no-export")
    assert autoquant(*call).exit_code == 0
    report, result = run / "report.html", run / "result.json"
    whole = report.read_text()
    report.unlink()
    assert autoquant(*call).exit_code == 0
    assert report.read_text() == whole
    report.write_text("older")
    newer = result.stat().st_mtime_ns
    os.utime(report, ns=(newer - 1, newer - 1))
    assert autoquant(*call).exit_code == 0
    assert report.read_text() == whole


@pytest.mark.slow
def test_points_of_a_search_that_is_recorded_again_are_there_once(
    given, autoquant, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    call = (*given, "--out", tmp_path / "run", "--no-export")
    assert autoquant(*call).exit_code == 0
    first = points(uri)
    assert autoquant(*call).exit_code == 0
    assert points(uri) == first
    (tmp_path / "run" / "result.json").unlink()
    assert autoquant(*call).exit_code == 0
    assert points(uri) == first


def points(uri: str) -> dict[tuple[str, str], list[int]]:
    """Steps of every metric of every run."""
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {
        (run.info.run_id, name): [p.step for p in client.get_metric_history(run.info.run_id, name)]
        for run in client.search_runs(experiments)
        for name in run.data.metrics
    }
