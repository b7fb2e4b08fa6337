"""The loop: what is measured, in which order, under which number, and what is taken over."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from joint import SPLIT, Scored, driver_of, explored, summed

from autoquant.measure.evaluator import Measurement, Request
from autoquant.measure.racing.local import LocalEvaluator
from autoquant.search.limits import Bounds
from autoquant.search.propose.proposal import Listed, Proposal
from autoquant.search.trials import Stage, Trial

TRIALS = 24
PROPOSED = {Stage.BASELINE, Stage.SOLVER, Stage.RUNNER_UP, Stage.REFIT, Stage.SWAP}


@pytest.fixture
def candidates(problem):
    return [(f"number {i}", problem.decode(s)) for i, s in enumerate(problem.knapsack.best(12))]


class Workers:
    """Another evaluator: requests and measurements cross a process's border as text."""

    def __init__(self, evaluator):
        self.evaluator = evaluator

    def measure(self, requests, coming=()):
        lines = [json.dumps(request.to_dict(), allow_nan=False) for request in requests]
        received = [Request.from_dict(json.loads(line)) for line in lines]
        answers = [json.dumps(m.to_dict()) for m in self.evaluator.measure(received)]
        return (Measurement.from_dict(json.loads(line)) for line in answers)


class Racing:
    """Proposes its list, all against one rival."""

    def __init__(self, candidates, rival):
        self.candidates, self.rival = list(candidates), rival

    def propose(self, history, count):
        found, self.candidates = self.candidates[:count], self.candidates[count:]
        return [
            Proposal(assignment=a, stage=Stage.SWAP, name=name, rival=self.rival)
            for name, a in found
        ]


def facts(trials):
    return [{**t.to_dict(), "seconds": 0.0} for t in trials]


@pytest.mark.parametrize("width", [1, 3, 5])
def test_trials_are_kept_in_the_order_of_their_proposals_each_before_the_next(
    problem, candidates, width
):
    kept = []
    scored = Scored(summed(problem))

    def keep(trial):
        kept.append((trial.number, trial.name, len(scored.batches)))
        assert driver.history.trials[-1] is trial

    driver = driver_of(
        problem, scored.joint, keep=keep, evaluator=LocalEvaluator(scored, SPLIT), width=width
    )
    assert driver.run(Listed(Stage.SOLVER, iter(candidates)), most=8)
    assert kept == [(i, f"number {i}", 4 * (i + 1)) for i in range(8)]
    trial = driver.history.trials[0]
    assert trial.stage is Stage.SOLVER
    assert trial.bpe == problem.accounting.bpe(trial.assignment)
    assert trial.fits
    assert trial.kl == pytest.approx(scored.joint(trial.assignment))
    assert (trial.tokens, len(trial.sequence_kl)) == (SPLIT.tokens, 32)


class Harder(Scored):
    """Every batch is harder than the one before it: the first is no measure of the whole."""

    def score_batch(self, assignment, split, index):
        scores = super().score_batch(assignment, split, index)
        return dataclasses.replace(scores, kl=scores.kl * (1 + index))


def test_a_stopped_candidate_has_the_rivals_kl_and_their_difference(problem, candidates):
    joint = {a.digest: 0.02 for _, a in candidates} | {candidates[0][1].digest: 0.01}
    scored = Harder(lambda a: joint[a.digest])
    driver = driver_of(problem, scored.joint, evaluator=LocalEvaluator(scored, SPLIT))
    driver.run(Listed(Stage.SOLVER, iter(candidates[:1])))
    (rival,) = driver.history.trials
    driver.run(Racing(candidates[1:2], rival))
    trial = driver.history.trials[1]
    assert trial.is_stopped
    assert not trial.is_eligible
    assert trial.tokens == SPLIT.tokens // 4
    assert rival.kl == pytest.approx(0.01 * (1 + 2 + 3 + 4) / 4)
    differences = np.array(trial.sequence_kl) - rival.sequence_kl[:8]
    assert trial.kl == pytest.approx(rival.kl + differences.mean()) == pytest.approx(0.035)
    assert trial.stderr == pytest.approx(differences.std(ddof=1) / np.sqrt(8))


def test_a_search_measures_the_same_through_workers(problem):
    joint = summed(problem)
    one = driver_of(problem, joint)
    other = driver_of(problem, joint, evaluator=Workers(one.evaluator))
    explored(problem, one, TRIALS)
    explored(problem, other, TRIALS)
    assert facts(one.history.trials) == facts(other.history.trials)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 3])
def test_a_search_stopped_at_any_trial_goes_on_as_if_it_had_not_been(problem, width):
    joint = summed(problem, noise=0.2)
    whole = driver_of(problem, joint, width=width)
    explored(problem, whole, TRIALS)
    trials = whole.history.trials
    assert any(t.is_stopped for t in trials)
    assert {t.stage for t in trials} >= PROPOSED
    for stop in range(0, len(trials), 5):
        log = stopped_at(problem, joint, stop, [], width)
        log = stopped_at(problem, joint, stop + 3, log, width)
        scored = Scored(joint)
        rest: list[Trial] = []
        last = driver_of(
            problem,
            joint,
            earlier=log,
            keep=rest.append,
            evaluator=LocalEvaluator(scored, SPLIT),
            width=width,
        )
        explored(problem, last, TRIALS)
        assert facts(last.history.trials) == facts(trials)
        assert facts([*log, *rest]) == facts(trials)
        assert {digest for digest, _ in scored.batches} == {t.assignment.digest for t in rest}


def stopped_at(problem, joint, count, log, width):
    """The log of a process that is interrupted once the log has `count` trials."""
    log = list(log)

    def keep(trial):
        if len(log) >= count:
            raise KeyboardInterrupt
        log.append(Trial.from_dict(json.loads(json.dumps(trial.to_dict()))))

    with pytest.raises(KeyboardInterrupt):
        explored(problem, driver_of(problem, joint, earlier=log, keep=keep, width=width), TRIALS)
    return log


def test_a_search_that_asks_otherwise_than_before_gives_no_number_twice(problem, candidates):
    """As after an upgrade of the libraries, which may turn a close decision."""
    before = driver_of(problem, summed(problem))
    before.run(Listed(Stage.SOLVER, iter(candidates[:6])))
    kept = []
    after = driver_of(problem, summed(problem), earlier=before.history.trials, keep=kept.append)
    after.run(Listed(Stage.SOLVER, iter([*candidates[8:], *candidates[3:5]])))
    assert [t.number for t in kept] == [6, 7, 8, 9]
    assert [t.number for t in after.history.trials] == list(range(10))


def test_another_budgets_trial_is_taken_over_as_this_searchs_own(problem, candidates):
    other = driver_of(problem, summed(problem))
    other.run(Listed(Stage.REFIT, iter(candidates[5:7])))
    kept = []
    driver = driver_of(
        problem,
        lambda _: 0.5,
        elsewhere=other.history.trials,
        keep=kept.append,
    )
    driver.run(Listed(Stage.SOLVER, iter(candidates[4:6])))
    measured, taken = driver.history.trials
    assert kept == [measured, taken]
    assert (measured.kl, measured.number) == (pytest.approx(0.5), 0)
    assert (taken.number, taken.stage, taken.name) == (1, Stage.SOLVER, "number 5")
    assert taken.kl == other.history.trials[0].kl
    assert taken.seconds == 0.0


def test_a_racer_is_run_again_where_another_budget_measured_it(problem, candidates):
    """A race may stop where the other budget's did not."""
    other = driver_of(problem, summed(problem))
    other.run(Listed(Stage.REFIT, iter(candidates[1:2])))
    joint = {candidates[0][1].digest: 0.01, candidates[1][1].digest: 0.02}
    driver = driver_of(problem, lambda a: joint[a.digest], elsewhere=other.history.trials)
    history = driver.history
    driver.run(Listed(Stage.SOLVER, iter(candidates[:1])))
    driver.run(Racing(candidates[1:2], history.trials[0]))
    assert history.trials[1].is_stopped


@pytest.mark.parametrize("width", [1, 4])
def test_time_ends_the_measuring_of_what_is_not_measured_yet(problem, candidates, width):
    clock = itertools.count()
    log_of = driver_of(problem, summed(problem))
    log_of.run(Listed(Stage.SOLVER, iter(candidates[:2])))
    driver = driver_of(problem, summed(problem), earlier=log_of.history.trials, width=width)
    bounds = Bounds(lambda: next(clock) < 3)
    assert not driver.run(Listed(Stage.SOLVER, iter(candidates)), bounds=bounds)
    assert [t.number for t in driver.history.trials] == [0, 1, 2, 3, 4]
    assert driver.run(Listed(Stage.SOLVER, iter(candidates[:5])), bounds=bounds)


@pytest.mark.parametrize(("more", "trials"), [(-1, 2), (0, 2), (1, 3)])
def test_the_trial_that_reaches_the_tokens_is_the_last(problem, candidates, more, trials):
    driver = driver_of(problem, summed(problem))
    bounds = Bounds(lambda: True, max_tokens=2 * SPLIT.tokens + more)
    assert not driver.run(Listed(Stage.SOLVER, iter(candidates)), bounds=bounds)
    assert len(driver.history.trials) == trials
    assert not driver.run(Listed(Stage.SOLVER, iter(candidates)), bounds=bounds)
    assert len(driver.history.trials) == trials


def test_most_is_no_bound_that_ends_a_search(problem, candidates):
    driver = driver_of(problem, summed(problem), width=5)
    assert driver.run(Listed(Stage.SOLVER, iter(candidates)), most=7)
    assert len(driver.history.trials) == 7
    assert driver.run(Listed(Stage.SOLVER, iter(candidates)), most=0)
    assert len(driver.history.trials) == 7
