"""What a history knows, and who in it may win."""

import dataclasses
import json
import math

import pytest

from autoquant.files import to_json
from autoquant.formats import FP8, NVFP4
from autoquant.plan.assignment import Assignment
from autoquant.search.history import History
from autoquant.search.trials import Stage, Trial

ASSIGNMENTS = [Assignment.of({"a": c, f"{i}": FP8}) for i in range(4) for c in (FP8, NVFP4)]


def trial(number, kl, **changes):
    settings = {
        "number": number,
        "stage": Stage.SWAP,
        "name": f"trial {number}",
        "assignment": ASSIGNMENTS[number],
        "kl": kl,
        "stderr": 0.001,
        "sequence_kl": (kl, kl),
        "tokens": 100 + number,
        "is_stopped": False,
        "bpe": 5.0,
        "fits": True,
        "seconds": 1.0,
    }
    return Trial(**(settings | changes))


def history_of(*trials):
    history = History()
    for each in trials:
        history.add(each)
    return history


@pytest.mark.parametrize("kl", [0.125, math.inf, -math.inf, math.nan])
def test_a_trial_is_read_back_as_it_was(kl):
    written = trial(2, kl, stderr=math.nan, params={"depth": 0.5}, rival=0, seen=2, predicted=0.5)
    read = Trial.from_dict(json.loads(to_json(written.to_dict())))
    assert repr(read) == repr(written)  # NaN is not equal to itself


def test_a_kl_that_earlier_versions_stored_as_null_is_not_a_number():
    record = trial(3, 0.1).to_dict()
    read = Trial.from_dict({**record, "kl": None, "stderr": None, "sequence_kl": [0.1, None]})
    assert math.isnan(read.kl)
    assert math.isnan(read.sequence_kl[1])
    assert not read.is_eligible


@pytest.mark.parametrize(
    "changes", [{"fits": False}, {"is_stopped": True}, {"kl": math.nan}, {"kl": -math.inf}]
)
def test_who_may_not_win_is_not_the_best(changes):
    barred = dataclasses.replace(trial(0, 0.001), **changes)
    history = history_of(barred, trial(1, 0.2), trial(2, 0.1), trial(3, 0.1))
    assert history.best() is history.trials[2]
    assert [t.number for t in history.eligible()] == [1, 2, 3]
    assert history_of(barred).best() is None


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_what_overflows_beats_none_and_is_beaten_by_all(kl):
    overflows, other = trial(0, kl), trial(1, 1e9)
    assert other.beats(overflows)
    assert not overflows.beats(other)
    assert not overflows.beats(trial(2, math.nan))
    assert min(overflows, other, key=lambda t: t.order) is other


def test_equals_do_not_beat_each_other():
    assert not trial(0, 0.1).beats(trial(1, 0.1))
    assert not trial(1, 0.1).beats(trial(0, 0.1))


def test_trials_are_found_by_their_assignment_and_counted():
    one, other = trial(0, 0.1), trial(1, 0.2)
    history = history_of(one, other)
    assert one.assignment in history
    assert history[other.assignment] is other
    assert ASSIGNMENTS[5] not in history
    assert history.trials == (one, other)
    assert history.tokens == 201


def test_an_assignment_has_one_trial():
    history = history_of(trial(0, 0.1))
    with pytest.raises(ValueError, match="trial 1 repeats 0"):
        history.add(trial(1, 0.2, assignment=ASSIGNMENTS[0]))


def test_what_others_measured_is_known_and_not_of_the_history():
    history = History([trial(4, 0.1)], elsewhere=[trial(5, 0.2)])
    assert history.trials == (trial(4, 0.1),)
    assert ASSIGNMENTS[5] not in history
    assert history.elsewhere(ASSIGNMENTS[5]) == trial(5, 0.2)
    assert history.elsewhere(ASSIGNMENTS[4]) is None
