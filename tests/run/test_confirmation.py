"""Who meets on the report tokens, and who may win there."""

import math

import numpy as np
import pytest

from autoquant.errors import SourceError
from autoquant.formats import FP8
from autoquant.measure.kl import TokenScores
from autoquant.plan.assignment import Assignment
from autoquant.run.confirmation import confirm
from autoquant.run.observer import Logged
from autoquant.search.history import History
from autoquant.search.trials import Stage, Trial
from autoquant.study.explore import Explored

SEQUENCES = 16


class Watching(Logged):
    def __init__(self):
        self.warnings, self.steps, self.announced = [], 0, 0

    def stage(self, name, steps, unit=None):
        self.announced = steps

    def step(self, count=1):
        self.steps += count

    def warn(self, message):
        self.warnings.append(message)


def trial(number, stage=Stage.SOLVER, kl=0.1, **changes):
    settings = {
        "number": number,
        "stage": stage,
        "name": f"name {number}",
        "assignment": Assignment.of({f"{number}": FP8}),
        "kl": kl,
        "stderr": 0.001,
        "sequence_kl": (kl,),
        "tokens": 64,
        "is_stopped": False,
        "bpe": 5.0,
        "fits": True,
        "seconds": 1.0,
    }
    return Trial(**(settings | changes))


def scores(mean):
    spread = np.tile([0.9, 1.1], SEQUENCES // 2)
    kl = np.repeat(mean * spread, 4)
    return TokenScores(
        kl=kl,
        sequence=np.repeat(np.arange(SEQUENCES), 4),
        unit=np.arange(SEQUENCES),
        agrees=kl > 0,
        nll_reference=kl,
        nll=kl,
    )


def confirmed(incumbent, challengers, baselines, report_kl, *, finalists=2):
    """`report_kl` is the mean KL on the report tokens by trial number."""
    history, observer, asked = History(), Watching(), []
    for each in (*baselines, incumbent, *challengers):
        history.add(each)

    def score(assignments):
        numbers = [int(name) for assignment in assignments for name in dict(assignment)]
        asked.extend(numbers)
        return [scores(report_kl[number]) for number in numbers]

    found = confirm(
        Explored(problem=None, incumbent=incumbent, challengers=tuple(challengers)),
        history,
        finalists=finalists,
        score=score,
        noise=lambda: 1e-5,
        seed=0,
        observer=observer,
    )
    return found, observer, asked


BASELINES = (trial(0, Stage.BASELINE, fits=False), trial(1, Stage.BASELINE))


def test_the_incumbent_its_challengers_and_the_baselines_meet():
    found, observer, asked = confirmed(
        trial(2), [trial(3), trial(4), trial(5)], BASELINES, dict.fromkeys(range(6), 0.1)
    )
    assert asked == [2, 3, 4, 0, 1]
    assert [t.number for t in found.candidates] == asked
    assert found.trial.number == 2
    assert found.differences.keys() == {0, 1, 2, 4}
    assert found.noise_floor == 1e-5
    assert (observer.announced, observer.steps, observer.warnings) == (5, 5, [])


def test_a_baseline_that_is_a_finalist_meets_once():
    baseline = trial(1, Stage.BASELINE)
    history = History()
    for each in (baseline, trial(2)):
        history.add(each)
    found = confirm(
        Explored(problem=None, incumbent=trial(2), challengers=(baseline,)),
        history,
        finalists=2,
        score=lambda assignments: [scores(0.1) for _ in assignments],
        noise=lambda: 0.0,
        seed=0,
        observer=Watching(),
    )
    assert [t.number for t in found.candidates] == [2, 1]


def test_a_challenger_that_gains_wins_and_what_exceeds_the_budget_never_does():
    found, _, _ = confirmed(trial(2), [trial(3)], BASELINES, {0: 0.01, 1: 0.1, 2: 0.1, 3: 0.05})
    assert found.trial.number == 3
    assert found.scores[found.winner].mean == pytest.approx(0.05)


def test_the_resolution_is_that_of_the_finalists():
    found, _, _ = confirmed(trial(2), [trial(3)], BASELINES, {0: 0.1, 1: 9.0, 2: 0.1, 3: 0.2})
    difference = found.differences[1]
    assert found.resolution == pytest.approx((difference.high - difference.low) / 2 / 0.1)
    alone, _, _ = confirmed(trial(2), [], BASELINES, {0: 0.1, 1: 9.0, 2: 0.1})
    assert math.isnan(alone.resolution)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_an_incumbent_that_overflows_on_these_tokens_is_out(kl):
    found, observer, asked = confirmed(
        trial(2), [trial(3), trial(4)], BASELINES, {0: 0.1, 1: 0.1, 2: kl, 3: 0.1, 4: 0.05}
    )
    assert asked == [2, 3, 4, 0, 1]
    assert [t.number for t in found.candidates] == [3, 4, 0, 1]
    assert found.trial.number == 4
    (warning,) = observer.warnings
    assert "trial 2 (solver: name 2) overflows" in warning
    assert observer.steps == 5


def test_a_baseline_that_overflowed_before_is_not_measured_again():
    broken = trial(1, Stage.BASELINE, kl=math.inf)
    found, observer, asked = confirmed(
        trial(2), [], (BASELINES[0], broken), {0: 0.1, 1: 0.1, 2: 0.1}
    )
    assert asked == [2, 0]
    assert [t.number for t in found.candidates] == [2, 0]
    assert "baseline: name 1" in observer.warnings[0]


def test_finalists_that_all_overflow_are_an_error():
    with pytest.raises(SourceError, match="every finalist on the report tokens is not finite"):
        confirmed(trial(2), [trial(3)], BASELINES, {0: 0.1, 1: 0.1, 2: math.nan, 3: math.inf})
