"""Fits to what a history holds, and the order of candidates by what they promise."""

import dataclasses
import math

import numpy as np
import pytest
from joint import driver_of, interacting, summed

from autoquant.search import predictions
from autoquant.search.history import History
from autoquant.search.predictor import Predictor
from autoquant.search.problem import Problem
from autoquant.search.propose.proposal import Listed
from autoquant.search.surrogate import Surrogate
from autoquant.search.trials import Stage


@pytest.fixture
def problem(small):
    return small(uneven=1.0)


def measured(problem, joint, count=24, width=1):
    """A history of the best selections of the knapsack."""
    driver = driver_of(problem, joint, width=width)
    best = [problem.decode(s) for s in problem.knapsack.best(count)]
    driver.run(Listed(Stage.RUNNER_UP, iter([(f"{i}", a) for i, a in enumerate(best)])))
    return driver.history


def test_the_most_promising_is_not_the_one_that_was_lucky(problem):
    """Two are measured about alike; what their groups do alone tells them apart."""
    best = [problem.decode(s) for s in problem.knapsack.best(24)]
    lucky, least = best[-1], problem.predicted(best[0])

    def joint(assignment):
        return 0.999 * least if assignment == lucky else problem.predicted(assignment)

    history = measured(problem, joint)
    assert history.best() is history[lucky]
    order = Predictor(problem).by_promise(history)
    assert order[0] is history[best[0]]
    assert order.index(history[lucky]) > 0


def test_promise_is_the_mean_of_what_is_measured_and_predicted(problem):
    history = measured(problem, summed(problem, noise=0.3))
    predictor = Predictor(problem)
    fitted = predictor.refitted(history)
    promise = {
        t.number: t.kl + fitted.predict([problem.selection(t.assignment)])[0]
        for t in history.trials
    }
    by_kl = sorted(history.trials, key=lambda t: t.order)
    order = predictor.by_promise(history)
    assert [promise[t.number] for t in order] == sorted(promise.values())
    assert order != by_kl


def test_what_the_problem_does_not_allow_is_taken_at_its_measurement(problem):
    history = measured(problem, summed(problem, noise=0.0))
    sound = problem.without("mse")
    others = [t for t in history.trials if not sound.allows(t.assignment)]
    assert others
    order = Predictor(sound).by_promise(history)
    assert sorted(t.number for t in order) == [t.number for t in history.trials]
    assert Predictor(sound).observed(history).trials == tuple(
        t for t in history.trials if sound.allows(t.assignment)
    )


def test_each_trial_is_turned_into_options_once(problem, monkeypatch):
    calls = []
    original = Problem.selection

    def selection(self, assignment):
        calls.append(assignment.digest)
        return original(self, assignment)

    monkeypatch.setattr(Problem, "selection", selection)
    history, predictor = measured(problem, summed(problem)), Predictor(problem)
    predictor.fitted(history)
    predictor.refitted(history)
    predictor.by_promise(history)
    assert len(calls) == len(set(calls)) == len(history.trials)


def test_a_fit_learns_nothing_of_what_overflows(problem):
    clean = measured(problem, summed(problem), count=20)
    mixed = History()
    for trial in measured(
        problem,
        lambda a: summed(problem)(a) if a in clean else math.inf,
        count=24,
    ).trials:
        mixed.add(trial)
    assert len(mixed.trials) == 24
    one, other = (Predictor(problem).refitted(history) for history in (clean, mixed))
    assert np.array_equal(one.correction, other.correction)
    assert one.law == other.law


def test_nothing_measured_predicts_from_probes_alone(problem):
    predictor, selections = Predictor(problem), problem.knapsack.best(5)
    fitted = predictor.refitted(History())
    expected = [problem.predicted(problem.decode(s)) for s in selections]
    assert fitted.predict(selections) == pytest.approx(expected)


@pytest.mark.parametrize("index", [0, 3, 11, 23])
def test_no_candidate_is_predicted_by_a_fit_that_has_seen_it(problem, index):
    """What is measured of a candidate changes the predictions of others, and not its own."""
    observed = Predictor(problem).observed(measured(problem, summed(problem)))
    changed = observed.kl.copy()
    changed[index] *= 3.0
    surrogate = Surrogate.of(problem)
    before, after = (
        predictions._left_out(surrogate, observed.selections, kl) for kl in (observed.kl, changed)
    )
    assert after[index] == before[index]
    fold = np.arange(24) % predictions.FOLDS == index % predictions.FOLDS
    assert np.array_equal(after[fold], before[fold])
    assert (after[~fold] != before[~fold]).all()


def test_predictions_name_their_trials_and_miss_by_what_they_say(problem):
    history = measured(problem, summed(problem, noise=0.3))
    found = predictions.describe_predictions(problem, history)
    assert [row["trial"] for row in found["trials"]] == [t.number for t in history.trials]
    predicted = np.array([row["kl"] for row in found["trials"]])
    kl = np.array([t.kl for t in history.trials])
    error = found["relative_error"]["with_interactions"]
    assert error == pytest.approx(np.mean(np.abs(predicted - kl) / kl))
    alone = np.array([problem.predicted(t.assignment) for t in history.trials])
    assert found["relative_error"]["sum"] == pytest.approx(np.mean(np.abs(alone - kl) / kl))
    frontier = found["frontier"]
    assert len(frontier) == predictions.FRONTIER_POINTS
    assert (np.diff([row["kl"] for row in frontier]) <= 0.0).all()
    assert (np.diff([row["bpe"] for row in frontier]) >= 0.0).all()


def test_predictions_say_what_interactions_are_worth(problem):
    problem = interacting(problem)
    truth = dataclasses.replace(Surrogate.of(problem), strength=0.6)

    def joint(assignment):
        return float(truth.predict([problem.selection(assignment)])[0])

    history = measured(problem, joint)
    kl = np.array([t.kl for t in history.trials])
    found = predictions.describe_predictions(problem, history)
    errors = found["relative_error"]
    selections = [problem.selection(t.assignment) for t in history.trials]
    alone = predictions._left_out(Surrogate.of(problem, with_pairs=False), selections, kl)
    assert errors["sum_mapped"] == pytest.approx(np.mean(np.abs(alone - kl) / kl))
    assert errors["with_interactions"] < 0.5 * errors["sum_mapped"]
    assert found["strength"] == pytest.approx(0.6, abs=0.1)
    assert found["scale"] == pytest.approx(1.0, abs=0.05)
    assert found["exponent"] == pytest.approx(1.0, abs=0.05)
    assert found["share"] == 1.0


def test_what_is_measured_at_zero_has_no_relative_error():
    measured, predicted = np.array([0.0, 0.5, -1e-9, 2.0]), np.array([1.0, 1.0, 1.0, 1.0])
    assert predictions._relative_error(predicted, measured) == pytest.approx((1.0 + 0.5) / 2)
    assert math.isnan(predictions._relative_error(predicted[:1], measured[:1]))
