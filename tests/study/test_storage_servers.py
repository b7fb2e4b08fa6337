"""A study repeated in PostgreSQL and behind a gRPC proxy, which go away and come back."""

import os
import signal

import optuna
import pytest
from joint import form_of, solved
from storage_servers import Postgres, Proxy, running, why_no_postgres

from autoquant.errors import RunConflict
from autoquant.search.quiet import quietly
from autoquant.store.run_directory import RunDirectory
from autoquant.study import mirror
from autoquant.study.journal import StudyLog
from autoquant.study.mirror import Mirror, open_storage

NAME = "tiny-6bpe"

pytestmark = pytest.mark.slow


@pytest.fixture(params=["postgres", "proxy"])
def server(request, tmp_path):
    if request.param == "postgres" and (why := why_no_postgres()) is not None:
        pytest.skip(why)
    with running(Postgres() if request.param == "postgres" else Proxy(tmp_path)) as server:
        yield server


@pytest.fixture
def log(problem, tmp_path):
    with RunDirectory.open(tmp_path / "run", {"model": "tiny"}) as run:
        yield StudyLog.open(run, NAME, form_of(problem))


def facts(study):
    return [
        (t.number, t.state, t.value, t.params, t.user_attrs, t.intermediate_values, t.constraints)
        for t in study.trials
    ]


def loaded(url):
    with quietly():
        return optuna.load_study(study_name=NAME, storage=open_storage(url))


def test_the_study_is_there_to_the_last_digit_and_none_is_added_twice(log, problem, server):
    """Also what is not finite, and a trial whose reply was lost."""
    warned: list[str] = []
    copy = Mirror(source=log.study, storage=open_storage(server.url), warn=warned.append)
    for trial in solved(problem, 4):
        log.add(trial)
        if trial.number == 2:
            server.stop()
        copy.send()
    assert [w.partition(" (")[0] for w in warned] == ["the study's storage went away"]
    server.start()
    loaded(server.url).add_trial(log.study.trials[2])  # it arrived, and nobody heard of it
    copy.finish()
    assert facts(loaded(server.url)) == facts(log.study)
    assert warned[1:] == ["the study's storage is back, and has all trials."]


def test_one_that_is_gone_is_said_in_one_line_and_the_next_call_adds_the_rest(
    log, problem, server, monkeypatch
):
    warned: list[str] = []
    copy = Mirror(source=log.study, storage=open_storage(server.url), warn=warned.append)
    for trial in solved(problem, 3):
        log.add(trial)
        copy.send()
        if trial.number == 0:
            server.stop()
    copy.finish()
    assert warned[1:] == ["2 trials are not in the study's storage; the same command adds them."]
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "READY_WITHIN", 1.0)
        with pytest.raises(RunConflict, match="does not answer") as refused:
            open_storage(server.url)
    assert "\n" not in refused.value.message
    server.start()
    Mirror(source=log.study, storage=open_storage(server.url), warn=warned.append).finish()
    assert facts(loaded(server.url)) == facts(log.study)
    assert len(warned) == 2


def test_one_that_hangs_holds_up_no_search(log, problem, tmp_path, monkeypatch):
    """A machine that is gone says nothing, not even that it is gone."""
    monkeypatch.setattr(mirror, "ANSWERS_WITHIN", 5.0)
    proxy, warned = Proxy(tmp_path), []
    first, second, third = solved(problem, 3)
    with running(proxy):
        copy = Mirror(source=log.study, storage=open_storage(proxy.url), warn=warned.append)
        log.add(first)
        copy.send()
        os.kill(proxy.process, signal.SIGSTOP)
        log.add(second)
        copy.send()
        assert warned == [
            "the study's storage went away (TimeoutError): the search goes on, and study.log has "
            "all trials."
        ]
        log.add(third)
        copy.send()
        os.kill(proxy.process, signal.SIGCONT)
        copy.finish()
        assert facts(loaded(proxy.url)) == facts(log.study)
    assert warned[1:] == ["the study's storage is back, and has all trials."]
