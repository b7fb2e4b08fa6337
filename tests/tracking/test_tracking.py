"""Searches in MLflow: what is recorded, and that it goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from recorded import KLS, RESULT, SETTINGS, Search, all_runs, client, history, mix, the_run
from records import forget_checksums

from autoquant.plan.assignment import Assignment
from autoquant.tracking import Tracker


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
    assert "50% less than uniform nvfp4, the only fixed recipe within the budget" in said
    assert [line.split(" | ")[0] for line in said.splitlines() if line.startswith("| ")] == [
        "| assignment",
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


def test_a_search_killed_before_it_wrote_down_its_run_continues_it(runs, search):
    search(KLS[:2])
    (search.folder / "tracking.json").unlink()
    search()
    assert search.warnings == []
    assert len(history(runs, "kl")) == len(KLS), "of the one run"


def test_a_search_begun_later_in_the_same_folder_is_another_run(runs, search):
    search(KLS[:2])
    forget_checksums(search.folder)
    (search.folder / "tracking.json").unlink()
    identity = json.loads((search.folder / "run.json").read_text())
    (search.folder / "run.json").write_text(
        json.dumps(identity | {"created": "2222-01-01T00:00:00+00:00"})
    )
    search()
    assert len(all_runs(runs)) == 2


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
