"""A study repeated in another storage, which may go away, and be another search's."""

import sqlite3

import optuna
import pytest
from joint import form_of, solved

from autoquant.errors import ConfigError, RunConflict
from autoquant.search.quiet import quietly
from autoquant.store.run_directory import RunDirectory
from autoquant.study.journal import ABOUT, StudyLog
from autoquant.study.mirror import Mirror, open_storage


@pytest.fixture(scope="module")
def trials(problem):
    return solved(problem, 4)


@pytest.fixture
def log(problem, tmp_path):
    with RunDirectory.open(tmp_path / "run", {"model": "tiny"}) as run:
        yield StudyLog.open(run, "tiny-6bpe", form_of(problem))


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'study.db'}"


class Going:
    """A database that goes away, held by another program, and comes back."""

    def __init__(self, url):
        impatient = {"connect_args": {"timeout": 0.01}}
        with quietly():
            self.storage = optuna.storages.RDBStorage(url, engine_kwargs=impatient)
        self.path, self.other = url.removeprefix("sqlite:///"), None

    def be(self, *, away):
        if self.other is not None:
            self.other.close()
        self.other = sqlite3.connect(self.path) if away else None
        if self.other is not None:
            self.other.execute("BEGIN EXCLUSIVE")


def mirror_of(log, storage, warned):
    return Mirror(source=log.study, storage=storage, warn=warned.append)


def loaded(url):
    with quietly():
        return optuna.load_study(study_name="tiny-6bpe", storage=url)


def facts(study):
    return [
        (t.number, t.value, t.params, t.user_attrs, t.intermediate_values, t.constraints)
        for t in study.trials
    ]


def test_each_trial_is_there_as_soon_as_it_is_in_the_journal(log, trials, url):
    warned: list[str] = []
    mirror = mirror_of(log, open_storage(url), warned)
    for count, trial in enumerate(trials, start=1):
        log.add(trial)
        mirror.send()
        assert facts(loaded(url)) == facts(log.study)
        assert len(loaded(url).trials) == count
    mirror.finish()
    assert warned == []
    assert loaded(url).user_attrs[ABOUT] == log.study.user_attrs[ABOUT]


@pytest.mark.slow
def test_a_storage_that_goes_away_ends_no_search_and_has_all_in_the_end(log, trials, url):
    warned: list[str] = []
    storage = Going(url)
    mirror = mirror_of(log, storage.storage, warned)
    for trial in trials:
        storage.be(away=trial.number in (1, 2))
        log.add(trial)
        mirror.send()
    assert len(loaded(url).trials) == 1
    assert [w.partition(" (")[0] for w in warned] == ["the study's storage went away"]
    mirror.finish()
    assert facts(loaded(url)) == facts(log.study)
    assert warned[1:] == ["the study's storage is back, and has all trials."]


@pytest.mark.slow
def test_what_a_storage_lacks_is_added_by_the_next_call(log, trials, url):
    warned: list[str] = []
    storage = Going(url)
    mirror = mirror_of(log, storage.storage, warned)
    for trial in trials:
        log.add(trial)
        storage.be(away=trial.number > 0)
        mirror.send()
    mirror.finish()
    storage.be(away=False)
    assert warned[-1] == ("3 trials are not in the study's storage; the same command adds them.")
    again: list[str] = []
    mirror_of(log, open_storage(url), again).finish()
    assert facts(loaded(url)) == facts(log.study)
    assert again == []


def test_another_search_that_adds_to_the_study_is_told_of_once_and_ends_no_search(log, trials, url):
    warned: list[str] = []
    mirror = mirror_of(log, open_storage(url), warned)
    log.add(trials[0])
    mirror.send()
    loaded(url).add_trial(log.form.frozen(trials[1]))
    for trial in trials[1:]:
        log.add(trial)
        mirror.send()
    mirror.finish()
    (told,) = warned
    assert "another search adds its trials to the study 'tiny-6bpe' of this --study-storage" in told
    assert "give one of them another --study-storage" in told
    assert len(loaded(url).trials) == 2


def test_a_file_that_becomes_read_only_ends_no_search_and_is_named_as_such(log, trials, url):
    path = url.removeprefix("sqlite:///")
    open_storage(url)
    warned: list[str] = []
    with quietly():
        storage = optuna.storages.RDBStorage(f"sqlite:///file:{path}?mode=ro&uri=true")
    log.add(trials[0])
    mirror_of(log, storage, warned).send()
    assert warned == [
        "the study's storage is read-only: the search goes on, and study.log has all trials."
    ]


@pytest.mark.parametrize("other", ["attributes", "trials"])
def test_the_study_of_another_search_is_refused(log, trials, url, other):
    with quietly():
        theirs = optuna.create_study(storage=url, study_name="tiny-6bpe")
    theirs.set_user_attr(ABOUT, {} if other == "attributes" else log.study.user_attrs[ABOUT])
    if other == "trials":
        theirs.add_trial(log.form.frozen(trials[1]))
    log.add(trials[0])
    for send in ("send", "finish"):
        mirror = mirror_of(log, open_storage(url), [])
        with pytest.raises(RunConflict, match="with other trials than this search's"):
            getattr(mirror, send)()
    assert len(loaded(url).trials) == (other == "trials")


def test_a_read_only_file_is_named_as_such_at_the_start(url):
    open_storage(url)
    path = url.removeprefix("sqlite:///")
    with pytest.raises(RunConflict, match="uri=true is read-only: ") as raised:
        open_storage(f"sqlite:///file:{path}?mode=ro&uri=true")
    assert "make the file and its folder writable" in raised.value.fix


@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        ("study.db", ConfigError, "study.db is no URL"),
        ("nosuch://user:secret@host/db", ConfigError, r"nosuch://\*\*\*@host/db cannot be used"),
        ("sqlite:////no/such/folder/study.db", RunConflict, "does not answer: "),
    ],
)
def test_what_is_no_storage_or_does_not_answer_is_said_at_the_start(url, error, said):
    with pytest.raises(error, match=said) as raised:
        open_storage(url)
    assert "secret" not in str(raised.value)
