"""MLflow's stores: which one is used, and that none ever costs a search."""

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from recorded import KLS, RESULT, Search, all_runs, client, history, the_run
from sqlalchemy import event
from sqlalchemy.engine import Engine

from autoquant.tracking import Tracker


@pytest.mark.slow
def test_two_searches_share_the_store_beside_them(runs):
    for name in ("a", "b"):
        Search(runs / name)()
    assert sorted(run.info.run_name for run in all_runs(runs)) == ["a", "b"]


def test_the_store_of_the_environment_is_used(runs, search, empty_store, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(empty_store, elsewhere / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere / 'mlflow.db'}")
    monkeypatch.chdir(elsewhere)
    search()
    assert search.warnings == []
    assert len(all_runs(elsewhere)) == 1
    assert all_runs(runs) == []


def test_a_store_that_cannot_be_opened_costs_one_warning(runs, search):
    (runs / "mlflow.db").unlink()
    (runs / "mlflow.db").mkdir()

    def record(tracker: Tracker) -> None:
        tracker.dataset("stdlib", digest="d1", context="report", tokens=1)
        tracker.result(RESULT)

    search(after=record)
    assert search.warnings == [
        "this search is not recorded in MLflow: unable to open database file"
    ]


def test_a_server_that_nobody_named_right_costs_one_warning(search, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://tracking.invalid")
    search()
    (warning,) = search.warnings
    assert warning.startswith("this search is not recorded in MLflow: ")
    assert "\n" not in warning


def test_a_folder_that_no_database_address_can_name_costs_one_warning(tmp_path):
    search = Search(tmp_path / "why?" / "run")
    search()
    (warning,) = search.warnings
    assert "has a character in its name" in warning
    assert {entry.name for entry in tmp_path.iterdir()} == {"why?"}


def test_a_damaged_store_costs_one_warning_and_stays_as_it_is(runs, search):
    (runs / "mlflow.db").write_text("this is no database, it is a text of some length\n" * 50)
    before = (runs / "mlflow.db").read_bytes()
    search()
    assert len(search.warnings) == 1
    assert (runs / "mlflow.db").read_bytes() == before


def test_a_store_that_comes_back_has_everything_in_the_end(runs, search, monkeypatch):
    def cut(tracker: Tracker) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise MlflowException("connection refused\nlong explanation")

        monkeypatch.setattr(MlflowClient, "log_batch", refuse)

    def mend(tracker: Tracker) -> None:
        search.wait_for_a_warning()
        monkeypatch.undo()

    search(before=cut, after=mend)
    assert search.warnings == ["recording in MLflow failed, the search goes on: connection refused"]
    assert the_run(runs).info.status == "FINISHED"
    assert history(runs, "kl") == list(enumerate(KLS))


def test_a_store_that_stays_away_costs_one_warning_and_no_trial(runs, search, monkeypatch):
    calls = []

    def cut(tracker: Tracker) -> None:
        def refuse(*_: object, **__: object) -> None:
            calls.append(1)
            raise ConnectionError("gone")

        for name in ("log_batch", "log_artifact", "set_terminated"):
            monkeypatch.setattr(MlflowClient, name, refuse)

    search(before=cut)
    assert search.warnings == [
        "recording in MLflow failed, the search goes on: gone",
        "5 records of this search are not in MLflow; the same command sends them.",
    ]
    assert len(calls) == 4, "when it failed and a few times at the end, not at every trial"


def test_no_trial_waits_for_a_store_that_is_slow(runs, search, monkeypatch):
    answers = threading.Event()
    log = MlflowClient.log_batch

    def wait(*arguments: Any, **settings: Any) -> Any:
        assert answers.wait(60)
        return log(*arguments, **settings)

    def answer(tracker: Tracker) -> None:
        assert not answers.is_set(), "every trial is over"
        answers.set()

    search(
        before=lambda tracker: monkeypatch.setattr(MlflowClient, "log_batch", wait), after=answer
    )
    assert search.warnings == []
    assert history(runs, "kl") == list(enumerate(KLS))


def test_one_record_that_a_store_refuses_does_not_keep_the_others(runs, search, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("no such API: this server is older")

    monkeypatch.setattr(MlflowClient, "set_tag", refuse)
    search(after=lambda tracker: tracker.result(RESULT))
    assert search.warnings[1:] == [
        "1 records of this search are not in MLflow; the same command sends them."
    ]
    run = the_run(runs)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["result/kl"] == 0.125
    assert [file.path for file in client(runs).list_artifacts(run.info.run_id)] == ["groups.json"]


def test_a_store_that_may_only_be_read_costs_one_warning(runs, search, monkeypatch, tmp_path):
    path = runs / "mlflow.db"
    before = path.read_bytes()
    monkeypatch.chdir(tmp_path)  # MLflow makes a folder named after the URI
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///file:{path}?mode=ro&uri=true")
    search()
    (warning,) = search.warnings
    assert warning.startswith("this search is not recorded in MLflow: ")
    assert "readonly database" in warning
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_store_that_another_holds_costs_one_warning(runs, search):
    with closing(sqlite3.connect(runs / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        search()
    assert search.warnings == ["this search is not recorded in MLflow: database is locked"]


@pytest.fixture
def _impatient() -> Iterator[None]:
    """MLflow waits 20 seconds for a lock; here it gives up at once."""

    def hurry(connection: Any, cursor: Any, statement: str, *rest: Any) -> tuple[str, Any]:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 20"), rest[0]

    event.listen(Engine, "before_cursor_execute", hurry, retval=True)
    yield
    event.remove(Engine, "before_cursor_execute", hurry)


@pytest.mark.usefixtures("_impatient")
def test_a_store_locked_in_the_middle_has_everything_in_the_end(runs, search):
    with closing(sqlite3.connect(runs / "mlflow.db")) as other:

        def release(tracker: Tracker) -> None:
            search.wait_for_a_warning()
            other.rollback()

        search(before=lambda tracker: other.execute("BEGIN EXCLUSIVE"), after=release)
    (warning,) = search.warnings
    assert warning.startswith("recording in MLflow failed, the search goes on: ")
    assert "locked" in warning
    assert the_run(runs).info.status == "FINISHED"
    assert history(runs, "kl") == list(enumerate(KLS))


def test_an_error_of_the_search_is_not_taken_for_one_of_the_store(search):
    def fail(tracker: Tracker) -> None:
        raise MlflowException("from the search itself")

    with pytest.raises(MlflowException, match="from the search itself"):
        search(after=fail)
    assert search.warnings == []


def test_passwords_are_not_recorded(runs, search):
    search(settings={"data": "https://ann:secret@host/text.jsonl"})
    assert the_run(runs).data.params == {"data": "https://***@host/text.jsonl"}


@pytest.mark.slow
def test_a_new_store_is_made_quietly_in_any_folder(tmp_path, capfd):
    folder = tmp_path / "a b#d é"
    search = Search(folder / "run")
    search()
    assert search.warnings == []
    assert {"mlflow.db", "mlartifacts", "run"} <= {entry.name for entry in folder.iterdir()}
    assert len(history(folder, "kl")) == len(KLS)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
