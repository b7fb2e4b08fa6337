"""Requests in, measurements out: in order, one at a time, and the same through JSON."""

import itertools
import json
import math

import numpy as np
import pytest
from joint import SPLIT, Scored

from autoquant.formats import FP8, NVFP4
from autoquant.measure.evaluator import Measurement, Request
from autoquant.measure.race import Gap, Race
from autoquant.measure.racing.local import LocalEvaluator
from autoquant.plan.assignment import Assignment

GOOD, BAD = Assignment.of({"a": FP8}), Assignment.of({"a": NVFP4})
KL = {GOOD.digest: 0.01, BAD.digest: 0.02}


@pytest.fixture
def scored():
    return Scored(lambda assignment: KL[assignment.digest])


def through_json(record):
    return type(record).from_dict(json.loads(json.dumps(record.to_dict(), allow_nan=False)))


def test_measurements_come_in_the_order_of_the_requests(scored):
    requests = [Request(assignment=a) for a in (BAD, GOOD, BAD)]
    found = list(LocalEvaluator(scored, SPLIT).measure(requests))
    assert [m.kl for m in found] == pytest.approx([0.02, 0.01, 0.02])
    assert [m.tokens for m in found] == [SPLIT.tokens] * 3
    assert not any(m.is_stopped for m in found)


def test_nothing_is_measured_before_it_is_asked_for(scored):
    measured = LocalEvaluator(scored, SPLIT).measure(Request(assignment=a) for a in (BAD, GOOD))
    assert scored.batches == []
    next(measured)
    assert scored.batches == [(BAD.digest, batch) for batch in range(4)]


def test_a_measurement_is_that_of_the_joined_batches(scored):
    (found,) = LocalEvaluator(scored, SPLIT).measure([Request(assignment=GOOD)])
    means = [scored.score_batch(GOOD, SPLIT, batch).by_sequence() for batch in range(4)]
    assert found.sequence_kl == tuple(np.concatenate(means).tolist())
    assert found.sequence_tokens == (32,) * 32
    assert found.stderr == pytest.approx(np.std(found.sequence_kl, ddof=1) / math.sqrt(32))


def test_requests_of_one_pass_share_its_seconds(scored, monkeypatch):
    clock = itertools.count(100.0, 6.0)
    monkeypatch.setattr("autoquant.measure.racing.local.time.monotonic", lambda: next(clock))
    requests = [Request(assignment=a) for a in (BAD, GOOD)]
    found = LocalEvaluator(scored, SPLIT, together=2).measure(requests)
    assert [m.seconds for m in found] == [12.0, 12.0], "half of each of four passes"


def test_a_loser_is_measured_on_the_batches_that_it_took(scored):
    rival = tuple(
        np.concatenate([scored.score_batch(GOOD, SPLIT, b).by_sequence() for b in range(4)])
    )
    scored.batches.clear()
    (found,) = LocalEvaluator(scored, SPLIT).measure(
        [Request(assignment=BAD, race=Race(rival=rival))]
    )
    assert scored.batches == [(BAD.digest, 0)]
    assert found.is_stopped
    assert found.tokens == 8 * 32
    assert found.gap is not None
    assert found.gap.mean == pytest.approx(0.01)


def test_no_race_is_lost_on_the_last_batch(scored):
    """All tokens are measured by then: the candidate has a KL of its own."""
    (found,) = LocalEvaluator(scored, SPLIT).measure(
        [Request(assignment=BAD, race=Race(rival=(0.001,) * 32, fewest=32))]
    )
    assert not found.is_stopped
    assert found.tokens == SPLIT.tokens


@pytest.mark.parametrize("race", [None, Race(rival=(0.1, 0.2), deviations=2.0, fewest=3)])
def test_a_request_is_read_back_as_it_was(race):
    request = Request(assignment=GOOD, race=race)
    assert through_json(request) == request


@pytest.mark.parametrize("kl", [0.1, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("gap", [None, Gap(0.2, 0.01)])
def test_a_measurement_is_read_back_as_it_was(kl, gap):
    measurement = Measurement(
        kl=kl,
        stderr=0.1,
        sequence_kl=(0.1, kl),
        sequence_tokens=(32, 64),
        gap=gap,
        seconds=1.5,
    )
    assert repr(through_json(measurement)) == repr(measurement)  # NaN is not equal to itself
