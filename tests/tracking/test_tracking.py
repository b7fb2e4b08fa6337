"""Searches in MLflow: what is recorded, that it goes on, and that it never costs a search."""

import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy import event
from sqlalchemy.engine import Engine

from autoquant.formats import Choice
from autoquant.plan.assignment import Assignment
from autoquant.store.run_directory import RunDirectory
from autoquant.tracking import ChildRuns, Tracker, TrialRecord, track

SETTINGS = {"model": "org/model", "budget_bpe": 5.0, "seed": 0}
KLS = (0.5, 0.25, 0.375)
RESULT = {
    "budget_bpe": 5.0,
    "budget_scope": "checkpoint",
    "activation_mode": "w4a4",
    "calibration": "stdlib",
    "tokens": {"report": {"tokens": 8192, "digest": "d" * 64}},
    "kl": {"mean": 0.125, "stderr": None, "p99": 0.5},
    "perplexity": {"bf16": 10.0, "quantized": 10.5},
    "top1_agreement": 0.75,
    "bpe": {"checkpoint": 4.75},
    "checkpoint_bytes": 4096,
    "counts": {"nvfp4": 3, "fp8": 1, "bf16": 0},
    "winner": {"digest": "ab"},
    "baselines": [
        {"name": "uniform nvfp4", "bpe": 4.5, "kl": 0.25, "stderr": 0.01, "fits": True},
        {
            "name": "experts nvfp4, rest fp8",
            "bpe": 5.5,
            "kl": 0.0625,
            "stderr": None,
            "fits": False,
        },
    ],
}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables made, which takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}")
    return path


@pytest.fixture
def runs(tmp_path: Path, empty_store: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


def mix(number: int) -> Assignment:
    """`number` groups in NVFP4, one in FP8, two in BF16."""
    kinds = ["nvfp4/max"] * number + ["fp8", "bf16", "bf16"]
    return Assignment.of({f"g{i}": Choice.parse(kind) for i, kind in enumerate(kinds)})


class Search:
    """A search of a few trials, as the driver records it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warnings: list[str] = []

    def __call__(
        self,
        kls: tuple[float, ...] = KLS,
        *,
        settings: dict[str, Any] = SETTINGS,
        child_runs: ChildRuns = "none",
        experiment: str = "autoquant",
        over_budget: frozenset[int] = frozenset(),
        before: Callable[[Tracker], None] = lambda tracker: None,
        after: Callable[[Tracker], None] = lambda tracker: None,
    ) -> None:
        with (
            RunDirectory.open(self.folder, {"seed": 0}) as run,
            track(
                run,
                settings,
                model="org/model",
                source_digest="d1",
                experiment=experiment,
                child_runs=child_runs,
                warn=self.warnings.append,
            ) as tracker,
        ):
            before(tracker)
            run.write_json("groups.json", {"groups": []})
            for number, kl in enumerate(kls):
                tracker.trial(
                    TrialRecord(
                        number=number,
                        origin="solver: optimum",
                        kl=kl,
                        bpe=4.9,
                        fits=number not in over_budget,
                        seconds=2.0,
                        assignment=mix(number),
                    )
                )
            after(tracker)

    def wait_for_a_warning(self) -> None:
        """Return once what a thread sends has failed."""
        deadline = time.monotonic() + 60
        while not self.warnings:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def search(runs: Path) -> Search:
    return Search(runs / "a")


def client(runs: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")


def all_runs(runs: Path, experiment: str = "autoquant") -> list[Run]:
    found = client(runs).get_experiment_by_name(experiment)
    return list(client(runs).search_runs([found.experiment_id])) if found else []


def the_run(runs: Path) -> Run:
    (run,) = all_runs(runs)
    return run


def history(runs: Path, metric: str) -> list[tuple[int, float]]:
    points = client(runs).get_metric_history(the_run(runs).info.run_id, metric)
    return sorted((point.step, point.value) for point in points)


def test_a_search_is_one_run_with_its_settings_and_trials(runs, search):
    search()
    run = the_run(runs)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a"
    assert run.data.params == {"model": "org/model", "budget_bpe": "5.0", "seed": "0"}
    assert run.data.tags["autoquant.model"] == "org/model"
    assert run.data.tags["autoquant.source_digest"] == "d1"
    assert run.data.tags["mlflow.user"]
    assert history(runs, "kl") == [(0, 0.5), (1, 0.25), (2, 0.375)]
    assert history(runs, "best_kl") == [(0, 0.5), (1, 0.25), (2, 0.25)]
    assert history(runs, "bpe") == [(0, 4.9), (1, 4.9), (2, 4.9)]
    assert history(runs, "seconds") == [(0, 2.0), (1, 2.0), (2, 2.0)]
    assert search.warnings == []


def test_files_of_the_run_directory_are_artifacts_beside_it(runs, search):
    search()
    run_id = the_run(runs).info.run_id
    assert [file.path for file in client(runs).list_artifacts(run_id)] == ["groups.json"]
    assert (runs / "mlartifacts" / run_id / "artifacts" / "groups.json").is_file()


def test_splits_are_data_set_inputs_recorded_once(runs, search):
    def record(tracker: Tracker) -> None:
        tracker.dataset("stdlib", digest="d" * 64, context="report", tokens=8192)

    search(before=record, after=lambda tracker: tracker.result(RESULT))
    (used,) = the_run(runs).inputs.dataset_inputs
    assert used.dataset.name == "stdlib"
    assert used.dataset.digest == "d" * 36
    assert used.dataset.profile == '{"num_tokens": 8192}'
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "report")]


def test_the_result_is_metrics_and_a_description_with_the_baselines(runs, search):
    search(after=lambda tracker: tracker.result(RESULT))
    run = the_run(runs)
    assert {name: run.data.metrics[name] for name in run.data.metrics if "/" in name} == {
        "result/kl": 0.125,
        "result/kl_p99": 0.5,
        "result/bpe": 4.75,
        "result/top1_agreement": 0.75,
        "result/perplexity": 10.5,
        "result/perplexity_bf16": 10.0,
        "result/checkpoint_bytes": 4096.0,
        "recipe/uniform nvfp4": 0.25,
        "recipe/experts nvfp4 rest fp8": 0.0625,
    }
    said = run.data.tags["mlflow.note.content"]
    assert "50% less than uniform nvfp4, the best fixed recipe within the budget" in said
    assert [line.split(" | ")[0] for line in said.splitlines() if line.startswith("| ")] == [
        "| mix",
        "| experts nvfp4, rest fp8",
        "| **this search**",
        "| uniform nvfp4",
    ]


def test_the_checkpoint_is_a_model_that_lies_outside(runs, search, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name in ("README.md", "config.json", "model.safetensors"):
        (checkpoint / name).write_text(name)
    result = RESULT | {"checkpoint": str(checkpoint)}
    for _ in range(2):
        search(after=lambda tracker: tracker.result(result))
    run = the_run(runs)
    (model,) = client(runs).search_logged_models([run.info.experiment_id])
    assert (model.name, model.status, model.source_run_id) == ("a", "READY", run.info.run_id)
    assert model.tags["autoquant.checkpoint"] == str(checkpoint)
    assert model.tags["mlflow.model.isExternal"] == "true"
    assert model.params["groups.nvfp4"] == "3"
    figures = {metric.key: metric for metric in model.metrics}
    assert figures["result/kl"].value == 0.125
    assert figures["result/kl"].dataset_digest == "d" * 36
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    files = sorted(
        file.name for file in Path(model.artifact_location.removeprefix("file://")).iterdir()
    )
    assert files == ["MLmodel", "README.md", "config.json", "location.json"]
    assert history(runs, "kl") == list(enumerate(KLS))
    assert search.warnings == []


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")]
)
def test_the_status_says_how_the_search_ended(runs, search, error, status):
    def stop(tracker: Tracker) -> None:
        raise error

    with pytest.raises(error):
        search(after=stop)
    assert the_run(runs).info.status == status
    assert len(history(runs, "kl")) == len(KLS)


def test_a_resumed_search_continues_its_run_and_records_each_trial_once(runs, search):
    def stop(tracker: Tracker) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(KLS[:2], after=stop)
    search((*KLS, 0.125), settings={**SETTINGS, "trials": 4})
    run = the_run(runs)
    assert run.info.status == "FINISHED"
    assert history(runs, "kl") == [(0, 0.5), (1, 0.25), (2, 0.375), (3, 0.125)]
    assert history(runs, "best_kl") == [(0, 0.5), (1, 0.25), (2, 0.25), (3, 0.125)]
    assert run.data.params["trials"] == "4"


def test_a_setting_that_changed_on_resuming_is_no_failure(runs, search):
    search(KLS[:1], settings={**SETTINGS, "trials": 1})
    search(KLS, settings={**SETTINGS, "trials": 3})
    assert search.warnings == []
    assert the_run(runs).data.params["trials"] == "1"
    assert len(history(runs, "kl")) == 3


def test_a_resumed_search_whose_store_is_gone_gets_a_new_run(runs, search, empty_store):
    search()
    shutil.rmtree(runs / "mlartifacts")
    shutil.copy(empty_store, runs / "mlflow.db")
    search()
    assert search.warnings == []
    assert len(history(runs, "kl")) == len(KLS)


@pytest.mark.parametrize(
    ("child_runs", "numbers"), [("none", []), ("best", [0, 1]), ("all", [0, 1, 2])]
)
def test_trials_get_child_runs_as_asked(runs, search, child_runs, numbers):
    search(child_runs=child_runs)
    (parent,) = (r for r in all_runs(runs) if "mlflow.parentRunId" not in r.data.tags)
    children = {r.info.run_name: r for r in all_runs(runs) if r is not parent}
    children.pop(parent.info.run_name, None)
    assert sorted(children) == [f"trial-{number:04d}" for number in numbers]
    for number in numbers:
        child = children[f"trial-{number:04d}"]
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["autoquant.plan.assignment"] == mix(number).digest
        assert child.data.params == {
            "groups.nvfp4": str(number),
            "groups.fp8": "1",
            "groups.bf16": "2",
            "origin": "solver: optimum",
            "fits": "True",
        }
        assert child.data.metrics == {"kl": KLS[number], "bpe": 4.9, "seconds": 2.0}
        stored = client(runs).download_artifacts(child.info.run_id, "assignment.json")
        assert Assignment.read(Path(stored)) == mix(number)


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["create_run", "log_batch", "log_text", "set_terminated"])
def test_a_search_killed_while_it_sent_a_trial_leaves_no_hole(runs, search, monkeypatch, cut):
    """Cut off at any call for the second trial, all of its records lost that came after."""
    send, sent = getattr(MlflowClient, cut), []

    def die(*arguments: Any, **settings: Any) -> Any:
        sent.append(1)
        if len(sent) > (2 if cut == "log_batch" else 1):
            raise ConnectionError("gone")
        return send(*arguments, **settings)

    with monkeypatch.context() as patch:
        search(child_runs="all", before=lambda tracker: patch.setattr(MlflowClient, cut, die))
    for name in ("b", "a"):
        Search(runs / name)(child_runs="all")
    (parent,) = (run for run in all_runs(runs) if run.info.run_name == "a")
    found = [
        run
        for run in all_runs(runs)
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    assert sorted((run.info.run_name, run.data.metrics["kl"]) for run in found) == [
        (f"trial-{number:04d}", kl) for number, kl in enumerate(KLS)
    ]
    assert {run.info.status for run in found} == {"FINISHED"}
    for run in found:
        client(runs).download_artifacts(run.info.run_id, "assignment.json")
    points = client(runs).get_metric_history(parent.info.run_id, "kl")
    assert sorted((point.step, point.value) for point in points) == list(enumerate(KLS))


def test_a_search_continued_under_another_experiment_stays_in_its_own(runs, search):
    search(KLS[:2], child_runs="all")
    search(child_runs="all", experiment="other")
    assert all_runs(runs, "other") == []
    names = [run.info.run_name for run in all_runs(runs)]
    assert sorted(names) == ["a", "trial-0000", "trial-0001", "trial-0002"]


def test_a_baseline_over_the_budget_is_recorded_but_never_the_best(runs, search):
    search((0.125, 0.5, 0.25), over_budget=frozenset({0}), child_runs="best")
    runs_by_name = {run.info.run_name: run for run in all_runs(runs)}
    assert sorted(runs_by_name) == ["a", "trial-0001", "trial-0002"]
    run_id = runs_by_name["a"].info.run_id
    for metric, points in {"kl": [0.125, 0.5, 0.25], "best_kl": [0.5, 0.25]}.items():
        recorded = client(runs).get_metric_history(run_id, metric)
        assert [point.value for point in sorted(recorded, key=lambda p: p.step)] == points


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


def test_a_store_that_may_only_be_read_costs_one_warning(runs, search, monkeypatch):
    path = runs / "mlflow.db"
    before = path.read_bytes()
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
