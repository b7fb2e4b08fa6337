"""The study on the disk: what is read back, who else may read it, and what damage is called."""

import dataclasses
import datetime
import json
import math
import re

import optuna
import pytest
from joint import SPLIT, form_of, solved
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from autoquant.errors import RunConflict, SourceError
from autoquant.store.records import sealed
from autoquant.store.run_directory import RunDirectory
from autoquant.study.journal import ABOUT, StudyLog, read_trials
from autoquant.study.record import Sequences
from autoquant.study.space import StudySpace

SIGNATURE = {"model": "tiny", "budget_bpe": 6.0}


@pytest.fixture(scope="module")
def trials(problem):
    """Of a search: one loses its race, one overflows, one is over the budget."""
    found = solved(problem, 5)
    cut = found[1].sequence_kl[:8]
    found[1] = dataclasses.replace(found[1], is_stopped=True, sequence_kl=cut, kl=0.5, tokens=256)
    overflow = (math.inf, *found[2].sequence_kl[1:])
    found[2] = dataclasses.replace(found[2], kl=math.inf, stderr=math.nan, sequence_kl=overflow)
    dearest = problem.uniform(lambda g: problem.accounting.choices[g.name][-1])
    found[3] = dataclasses.replace(found[3], assignment=dearest, fits=False, kl=1e-5)
    return found


def opened(run, problem, **changes):
    return StudyLog.open(run, "tiny-6bpe", dataclasses.replace(form_of(problem), **changes))


@pytest.fixture
def journal(problem, trials, tmp_path):
    """The journal of a run with all the trials."""
    with RunDirectory.open(tmp_path / "run", SIGNATURE) as run:
        study = opened(run, problem)
        for trial in trials:
            study.add(trial)
    return tmp_path / "run" / "study.log"


def goes_on(journal, problem):
    with RunDirectory.open(journal.parent, SIGNATURE) as run:
        return opened(run, problem).trials()


def by_optuna(journal):
    storage = JournalStorage(JournalFileBackend(str(journal)))
    return optuna.load_study(study_name="tiny-6bpe", storage=storage)


def test_trials_are_read_back_as_they_were_by_readers_and_by_the_search(journal, problem, trials):
    assert repr(read_trials(journal.parent)) == repr(trials)  # NaN is not equal to itself
    assert repr(goes_on(journal, problem)) == repr(trials)


def test_optunas_own_reader_opens_the_journal(journal, problem, trials):
    found = by_optuna(journal).trials
    assert [t.value for t in found] == [t.kl if math.isfinite(t.kl) else None for t in trials]
    assert [t.state.name for t in found] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    for one, trial in zip(found, trials, strict=True):
        assert one.duration == datetime.timedelta(seconds=trial.seconds)
        assert one.params == {g.name: str(trial.assignment[g.name]) for g in problem.groups}
        finite = {i: kl for i, kl in enumerate(trial.sequence_kl) if math.isfinite(kl)}
        assert one.intermediate_values == finite
        (limit,) = problem.limits
        over = limit.cost.total(trial.assignment) - limit.at_most
        assert one.constraints == {limit.cost.name: over}
        assert (over <= 0) == trial.fits
        assert (one.user_attrs["stage"], one.user_attrs["digest"]) == (
            "solver",
            trial.assignment.digest,
        )


def test_what_optuna_calls_the_best_is_the_searchs_best(journal, problem, trials):
    """Not the better one over the budget."""
    best = min((t for t in trials if t.is_eligible), key=lambda t: t.order)
    assert by_optuna(journal).best_trial.number == best.number
    assert len(optuna.importance.get_param_importances(by_optuna(journal))) == len(problem.groups)


def test_documents_have_the_mean_of_their_tokens():
    sequences = Sequences(document=(7, 7, 9), tokens=(10, 30, 5))
    assert sequences.by_document((1.0, 2.0, 4.0)) == [1.75, 4.0]
    assert sequences.by_document((1.0, 2.0)) == [1.75]


def test_what_a_study_is_about_says_the_space_and_the_sequences(journal, problem):
    about = by_optuna(journal).user_attrs[ABOUT]
    assert about["signature"] == SIGNATURE
    assert StudySpace.from_dict(about["space"]) == StudySpace.of(problem.accounting)
    assert (len(about["documents"]), sum(about["tokens"])) == (SPLIT.sequences, SPLIT.tokens)


@pytest.mark.parametrize("kept", range(7))
def test_a_kill_in_the_middle_of_any_line_loses_that_line_alone(journal, problem, trials, kept):
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:kept]) + lines[kept][:-1])
    whole = max(0, kept - 2)
    assert repr(read_trials(journal.parent)) == repr(trials[:whole])
    with RunDirectory.open(journal.parent, SIGNATURE) as run:
        study = opened(run, problem)
        for trial in trials[whole:]:
            study.add(trial)
    assert repr(read_trials(journal.parent)) == repr(trials)
    assert len(by_optuna(journal).trials) == len(trials)


def test_what_a_dashboard_notes_is_kept_and_in_nobodys_way(journal, problem, trials):
    study = by_optuna(journal)
    study.set_user_attr("note", "see trial 2")
    with RunDirectory.open(journal.parent, SIGNATURE) as run:
        log = opened(run, problem)
        assert repr(log.trials()) == repr(trials)
        log.add(dataclasses.replace(trials[4], number=5))
    assert len(read_trials(journal.parent)) == 6
    assert by_optuna(journal).user_attrs["note"] == "see trial 2"
    assert len(by_optuna(journal).trials) == 6


def with_line(lines, index, *instead):
    return [*lines[:index], *instead, *lines[index + 1 :]]


DAMAGE = {
    "a KL": (lambda ls: with_line(ls, 3, re.sub(rb'"value": 0\.\d', b'"value": 0.9', ls[3])), 4),
    "not JSON": (lambda ls: with_line(ls, 3, b"garbage\n"), 4),
    "no checksum": (lambda ls: with_line(ls, 3, re.sub(rb', "checksum": "\w+"', b"", ls[3])), 4),
    "the attributes": (lambda ls: with_line(ls, 1, ls[1].replace(b"max", b"mse")), 2),
    "a line is gone": (lambda ls: with_line(ls, 3), None),
    "two in the other order": (lambda ls: [*ls[:3], ls[4], ls[3], *ls[5:]], None),
    "no study": (lambda ls: ls[1:], None),
    "no attributes": (lambda ls: with_line(ls, 1), None),
    "two studies": (lambda ls: [*ls, other_study(ls)], None),
}


def other_study(lines):
    line = json.loads(lines[0]) | {"study_name": "another"}
    line.pop("checksum")
    return json.dumps(sealed(line)).encode() + b"\n"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_journal_that_is_not_what_was_written_is_damaged(journal, problem, damage):
    change, number = DAMAGE[damage]
    lines = journal.read_bytes().splitlines(keepends=True)
    changed = change(lines)
    assert changed != lines
    journal.write_bytes(b"".join(changed))
    where = r"study\.log" + (f" line {number}" if number else "") + " is damaged"
    with pytest.raises(SourceError, match=where):
        read_trials(journal.parent)
    with pytest.raises(SourceError, match=where):
        goes_on(journal, problem)


def test_a_trial_that_somebody_else_added_is_no_trial_of_the_search(journal, problem):
    study = by_optuna(journal)
    study.add_trial(study.trials[0])
    with pytest.raises(SourceError, match="line 8"):
        goes_on(journal, problem)


def test_the_study_of_another_search_is_refused(journal, problem, tmp_path):
    with RunDirectory.open(tmp_path / "other", SIGNATURE | {"budget_bpe": 7.0}) as run:
        (run.path / "study.log").write_bytes(journal.read_bytes())
        with pytest.raises(RunConflict, match=r"budget_bpe is 6\.0 there and 7\.0 here"):
            opened(run, problem)
    with RunDirectory.open(journal.parent, SIGNATURE) as run:
        shorter = Sequences(document=(0, 1), tokens=(5, 5))
        with pytest.raises(RunConflict, match="its space or its search tokens are others"):
            opened(run, problem, sequences=shorter)


def test_the_trials_of_an_earlier_version_are_read(tmp_path, trials):
    with RunDirectory.open(tmp_path / "run", SIGNATURE) as run:
        for trial in trials:
            run.append("trials.jsonl", trial.to_dict())
    assert repr(read_trials(tmp_path / "run")) == repr(trials)
