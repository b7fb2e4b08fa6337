"""Races by waves: fewer passes over streamed weights, and the same trials to the last bit."""

import dataclasses
import math

import numpy as np
import pytest
from joint import SPLIT, Scored, driver_of, explored, summed

from autoquant.measure.evaluator import Request
from autoquant.measure.race import Race
from autoquant.measure.racing.local import LocalEvaluator
from autoquant.plan.assignment import Assignment
from autoquant.search.trials import Stage

TRIALS = 30
BATCHES = len(SPLIT.batches)
MANY = 1000
"""Forwards that go together where memory is no bound."""


class Passes(Scored):
    """Scores as a model whose weights are brought for each pass; sequences differ by candidate."""

    def __init__(self, joint, pairs):
        super().__init__(joint)
        self.pairs = pairs
        self.passes = []
        """The (candidate, batch) pairs of each."""

    def waves(self, split, batches, *, forwards):
        count = max(1, self.pairs // forwards)
        return (batches[first : first + count] for first in range(0, len(batches), count))

    def score_batches(self, assignments, split, batches):
        before = len(self.batches)
        found = super().score_batches(assignments, split, batches)
        self.passes.append(self.batches[before:])
        return found

    def score_batch(self, assignment, split, index):
        scores = super().score_batch(assignment, split, index)
        own = np.random.default_rng([int(assignment.digest, 16), index])
        factor = np.exp(0.1 * own.normal(size=len(split.units[index])))
        return dataclasses.replace(scores, kl=scores.kl * factor[scores.sequence])


def streamed(joint, pairs=MANY, waited=lambda: 0.0):
    scored = Passes(joint, pairs)
    return scored, LocalEvaluator(scored, SPLIT, together=pairs, pairs=pairs, waited=waited)


def search(problem, evaluator, width=1):
    driver = driver_of(problem, summed(problem), evaluator=evaluator, width=width)
    explored(problem, driver, TRIALS)
    return driver.history.trials


def facts(trials):
    return [{**trial.to_dict(), "seconds": 0.0} for trial in trials]


@pytest.fixture(scope="module")
def one_by_one(problem):
    """The trials of weights in memory, each batch by batch."""
    found = {}

    def of(width):
        if width not in found:
            scored = Passes(summed(problem, noise=0.3), 1)
            found[width] = search(problem, LocalEvaluator(scored, SPLIT), width)
        return found[width]

    return of


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("pairs", [1, 5, 16, MANY])
def test_trials_are_those_of_one_batch_at_a_time(problem, one_by_one, pairs, width):
    scored, evaluator = streamed(summed(problem, noise=0.3), pairs)
    trials = search(problem, evaluator, width)
    assert facts(trials) == facts(one_by_one(width))
    assert sum(trial.is_stopped for trial in trials) > 5, "races are lost, or nothing is tested"
    assert any(0 < t.tokens < SPLIT.tokens // 2 for t in trials), "on the first batch"
    assert max(map(len, scored.passes)) <= max(pairs, width)


def test_a_round_is_two_passes_whatever_its_trials(problem):
    scored, evaluator = streamed(summed(problem, noise=0.3))
    trials = search(problem, evaluator)
    stages = [trial.stage for trial in trials]
    refined = [stage in (Stage.RUNNER_UP, Stage.REFIT, Stage.SWAP) for stage in stages]
    assert sum(refined) == TRIALS
    given, runners_up, looks = refined.index(True), stages.count(Stage.RUNNER_UP), 2
    assert len(scored.passes[0]) == BATCHES * given, "what rests on no measurement, in one pass"
    assert len(scored.passes[1]) == runners_up, "all on the first batch"
    lost = sum(t.is_stopped and t.tokens == SPLIT.tokens // BATCHES for t in trials[:TRIALS])
    assert len(scored.passes[2]) <= (runners_up - 1) * (BATCHES - 1), "losers stay behind"
    assert lost
    swaps = stages.count(Stage.SWAP)
    assert len(scored.passes) <= 1 + looks * (1 + 2 + swaps) < 1 + TRIALS


def test_one_pass_takes_all_where_passes_wait_for_weights(problem, one_by_one):
    ticks = iter(range(0, 10**9, 1000))
    scored, evaluator = streamed(summed(problem, noise=0.3), waited=lambda: float(next(ticks)))
    assert facts(search(problem, evaluator)) == facts(one_by_one(1))
    runners_up = math.ceil(TRIALS / 2)
    assert len(scored.passes[1]) == runners_up * BATCHES
    _, waiting = streamed(summed(problem, noise=0.3))
    assert len(scored.passes) < len(passes_of(problem, waiting))


def passes_of(problem, evaluator):
    search(problem, evaluator)
    return evaluator.scorer.passes


def assignments_of(problem, count):
    return [problem.decode(selection) for selection in problem.knapsack.best(count)]


def test_what_went_along_is_not_scored_again(problem):
    first, *others = assignments_of(problem, 4)
    scored, evaluator = streamed(summed(problem))
    (alone,) = evaluator.measure([Request(assignment=first)], others)
    assert len(scored.passes) == 1
    for place, other in enumerate(others):
        (found,) = evaluator.measure([Request(assignment=other)], others[place + 1 :])
        (expected,) = streamed(summed(problem))[1].measure([Request(assignment=other)])
        assert found.sequence_kl == expected.sequence_kl
    assert len(scored.passes) == 1
    assert alone.seconds > 0.0
    [*evaluator.measure([Request(assignment=others[0])])]
    assert len(scored.passes) == 2, "what was given away is not kept"


def test_what_lost_against_another_rival_is_measured_on(problem):
    first, other = assignments_of(problem, 2)
    strict = Race(rival=(1e-6,) * 32)
    scored, evaluator = streamed(summed(problem))
    [*evaluator.measure([Request(assignment=first, race=strict)], [other])]
    assert [len(pairs) for pairs in scored.passes] == [2], "both are lost on the first batch"
    (found,) = evaluator.measure([Request(assignment=other)])
    assert found.tokens == SPLIT.tokens
    assert [len(pairs) for pairs in scored.passes] == [2, BATCHES - 1]


def test_nothing_goes_along_where_weights_are_in_memory(problem):
    first, *others = assignments_of(problem, 3)
    scored = Scored(summed(problem))
    [*LocalEvaluator(scored, SPLIT).measure([Request(assignment=first)], others)]
    assert scored.batches == [(first.digest, index) for index in range(BATCHES)]


def test_a_race_that_no_few_batches_decide_is_one_wave(problem):
    """A second pass would save nothing: the least number of documents is in all batches alone."""
    first, *others = assignments_of(problem, 3)
    scored, evaluator = streamed(summed(problem))
    race = Race(rival=(1e-6,) * 32, fewest=32)
    (found,) = evaluator.measure([Request(assignment=first, race=race)], others)
    assert not found.is_stopped
    assert len(scored.passes) == 1


def test_an_assignment_that_is_asked_for_is_scored_once_though_it_is_expected(problem):
    first, _ = assignments_of(problem, 2)
    assert isinstance(first, Assignment)
    scored, evaluator = streamed(summed(problem))
    [*evaluator.measure([Request(assignment=first)], [first])]
    assert len(scored.batches) == BATCHES
