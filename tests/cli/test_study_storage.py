"""`--study-storage` and the study of several budgets, from the command line."""

import json
import re

import launched
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from records import trials_of
from searchable import TOKEN_FLAGS, save_searchable, save_text
from storage_servers import Postgres, Proxy, running, why_no_postgres

from autoquant.run.config import SearchConfig
from autoquant.study.mirror import open_storage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("storage")
    save_searchable("llama", folder / "model", num_hidden_layers=2)
    save_text(folder / "text")
    return folder


@pytest.fixture
def search(autoquant, folder, tmp_path):
    def call(*flags, budget="10"):
        return autoquant(*words(folder, tmp_path / "run", *flags, budget=budget))

    return call


def words(folder, run, *flags, budget="10"):
    return [
        *("search", folder / "model", "--calibration", folder / "text", *TOKEN_FLAGS),
        *("--budget-bpe", budget, "--trials", 2, "--no-mlflow", "--no-export"),
        *("--out", run, *flags),
    ]


@pytest.mark.slow
def test_every_trial_is_in_the_storage_also_of_a_finished_run(search, tmp_path):
    done = search()
    assert done.exit_code == 0, done.stderr
    url = f"sqlite:///{tmp_path / 'study.db'}"
    again = search("--study-storage", url)
    assert again.exit_code == 0, again.stderr
    assert "already holds this search's result" in again.stderr
    (name,) = optuna.get_all_study_names(url)
    study = optuna.load_study(study_name=name, storage=url)
    trials = trials_of(tmp_path / "run")
    assert [t.user_attrs["kl"] for t in study.trials] == [trial["kl"] for trial in trials]


def test_a_storage_that_does_not_answer_is_exit_5_before_anything_is_measured(search, tmp_path):
    done = search("--study-storage", f"sqlite:///{tmp_path / 'no' / 'study.db'}")
    assert done.exit_code == 5
    assert "does not answer" in done.stderr
    assert "fix: start it; a search does without --study-storage too" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_read_only_storage_is_exit_5_before_anything_is_measured(search, tmp_path):
    file = tmp_path / "study.db"
    optuna.storages.RDBStorage(f"sqlite:///{file}")
    done = search("--study-storage", f"sqlite:///file:{file}?mode=ro&uri=true")
    assert done.exit_code == 5
    assert "is read-only" in done.stderr
    assert "fix: make the file and its folder writable" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["postgres", "proxy"])
def test_a_server_that_goes_away_ends_no_search_and_the_same_command_adds_the_rest(
    search, folder, tmp_path, kind
):
    if kind == "postgres" and (why := why_no_postgres()) is not None:
        pytest.skip(why)
    with running(Postgres() if kind == "postgres" else Proxy(tmp_path)) as server:
        told = interrupted(folder, tmp_path / "run", server)
        assert told.count("the study's storage went away (") == 1
        assert re.search(r"\d+ trials are not in the study's storage; the same command", told)
        server.start()
        again = search("--study-storage", server.url)
        assert again.exit_code == 0, again.stderr
        assert "storage" not in again.stderr
        storage = open_storage(server.url)
        (name,) = optuna.get_all_study_names(storage)
        theirs = optuna.load_study(study_name=name, storage=storage).trials
    backend = JournalFileBackend(str(tmp_path / "run" / "study.log"))
    ours = optuna.load_study(study_name=name, storage=JournalStorage(backend)).trials
    assert [(t.number, t.values, t.params, t.user_attrs) for t in theirs] == [
        (t.number, t.values, t.params, t.user_attrs) for t in ours
    ]


def interrupted(folder, run, server):
    """What a search prints whose storage ends behind its second trial."""
    log = run.with_suffix(".err")
    with launched.alone(words(folder, run, "--study-storage", server.url), log) as process:
        launched.wait_for("^trial   1", log.read_text, process)
        server.stop()
        assert process.wait(timeout=launched.PATIENCE) == 0, log.read_text()
    return log.read_text()


def test_a_password_is_in_no_command_and_no_settings():
    config = SearchConfig.of(
        {"budget_bpe": 5, "study_storage": "postgresql://me:pw5f3a91@host/studies"}
    )
    assert "--study-storage 'postgresql://***@host/studies'" in config.command_line()
    assert "study_storage" not in config.saved()


@pytest.mark.slow
def test_several_budgets_leave_the_study_of_their_frontier(search, tmp_path):
    done = search(budget="10,12")
    assert done.exit_code == 0, done.stderr
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "run" / "frontier.log")))
    study = optuna.load_study(study_name=None, storage=storage)
    runs = {name: trials_of(tmp_path / "run" / name) for name in ("10bpe", "12bpe")}
    whole = {t["digest"] for own in runs.values() for t in own if not t["is_stopped"]}
    assert {t.user_attrs["digest"] for t in study.trials} == whole
    assert len(study.trials) == len(whole)
    for trial in study.trials:
        own = runs[trial.user_attrs["run"]][trial.user_attrs["number"]]
        assert (own["kl"], own["digest"]) == (trial.values[0], trial.user_attrs["digest"])
    for name in runs:
        result = json.loads((tmp_path / "run" / name / "result.json").read_text())
        winner = result["winner"]["digest"]
        sizes = [t.values[1] for t in study.trials if t.user_attrs["digest"] == winner]
        assert sizes == [result["checkpoint_bytes"]]
    best = [trial.values for trial in study.best_trials]
    assert best
    assert not any(o[0] < b[0] and o[1] < b[1] for b in best for o in best)
