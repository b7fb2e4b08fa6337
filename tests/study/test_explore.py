"""A search's measurements as a whole: their order, the check of scale rules, and who may win."""

import dataclasses
import math

import pytest
from joint import FREE, SPLIT, Scored, driver_of, explored, summed, with_space

from autoquant.errors import SourceError
from autoquant.formats import Choice
from autoquant.measure.racing.local import LocalEvaluator
from autoquant.search.limits import Bounds
from autoquant.search.predictor import Predictor
from autoquant.search.propose.scale_rules import ScaleRules, is_clearly_better
from autoquant.search.propose.shares import MOST_RUNNERS_UP, Effort
from autoquant.search.trials import Stage
from autoquant.study.explore import most_trials

NOTHING = 0


@pytest.fixture
def even(small):
    """Alone, every group is best off with `mse`."""
    return small()


def rules_of(assignment):
    return {str(c.scale_rule) for _, c in assignment if c.scale_rule is not None}


def by_rules(**kl):
    """Joint KL by the scale rules that an assignment uses."""
    return lambda assignment: kl.get("_".join(sorted(rules_of(assignment))), 1.0)


def checked(problem, **kl):
    driver = driver_of(problem, by_rules(**kl))
    found = explored(problem, driver, NOTHING)
    return driver.history[problem.optimum()], found


def test_a_rule_that_helps_all_groups_together_stays(even):
    optimum, found = checked(even, mse=0.5, max=0.6)
    assert found.problem is even
    assert found.incumbent is optimum


def test_a_rule_that_harms_all_groups_together_is_closed(even):
    optimum, found = checked(even, mse=0.5, max=0.4, four_over_six=0.45)
    assert "mse" in rules_of(optimum.assignment)
    assert rules_of(found.incumbent.assignment) == {"four_over_six"}
    assert found.problem.allows(found.incumbent.assignment)
    assert not found.problem.allows(optimum.assignment)
    assert (found.incumbent.kl, found.incumbent.name) == (
        pytest.approx(0.45),
        "optimum, rules closed",
    )


def test_no_rule_is_closed_where_the_next_best_mix_is_worse_still(even):
    optimum, found = checked(even, mse=0.5, max=0.4, four_over_six=0.55)
    assert found.problem is even
    assert found.incumbent is optimum


def test_a_rule_under_which_the_model_overflows_is_closed(even):
    optimum, found = checked(even, mse=math.nan, max=0.4, four_over_six=0.45)
    assert rules_of(found.incumbent.assignment) == {"four_over_six"}
    assert optimum not in found.challengers


def test_a_rule_is_not_closed_for_a_replacement_that_overflows(even):
    optimum, found = checked(even, mse=0.5, max=-math.inf)
    assert found.incumbent is optimum


def test_a_rule_is_not_closed_for_a_gain_within_its_error(even):
    """Sequence by sequence the replacement is now better, now worse, and a little better."""
    driver = driver_of(even, by_rules(mse=0.5, max=0.4, four_over_six=0.45))
    explored(even, driver, NOTHING)
    optimum = driver.history[even.optimum()]
    replaced = next(t for t in driver.history.trials if rules_of(t.assignment) == {"max"})
    swing = [0.2 if n % 2 else -0.19 for n in range(len(replaced.sequence_kl))]
    noisy = dataclasses.replace(
        replaced, sequence_kl=tuple(k - s for k, s in zip(optimum.sequence_kl, swing, strict=True))
    )
    assert is_clearly_better(replaced, optimum)
    assert noisy.beats(optimum)
    assert not is_clearly_better(noisy, optimum)


FITTED = """\
schema_version: 1
name: fitted
rules: [{match: "*", formats: [nvfp4/max, nvfp4/mse, nvfp4/hessian/gptq, bf16]}]
"""


@pytest.fixture
def fitted(even):
    """Alone, every group is best off with compensated rounding."""
    return with_space(even, FITTED, {"nvfp4/max": 8.0, "nvfp4/mse": 6.0, "nvfp4/hessian/gptq": 5.0})


def by_roundings(plain, gptq):
    return lambda a: gptq if any(c.rounding == "gptq" for _, c in a) else plain


@pytest.mark.parametrize(("plain", "gptq", "stays"), [(0.6, 0.5, True), (0.5, 0.6, False)])
def test_a_rounding_is_held_to_all_groups_together_as_rules_are(fitted, plain, gptq, stays):
    driver = driver_of(fitted, by_roundings(plain, gptq))
    found = explored(fitted, driver, NOTHING)
    used = {c.rounding for _, c in found.incumbent.assignment}
    assert used == ({"nearest", "gptq"} if stays else {"nearest"})


def test_the_check_of_rules_proposes_nothing_else(even):
    driver = driver_of(even, by_rules(mse=0.5, max=0.4, four_over_six=0.45))
    explored(even, driver, NOTHING)
    assert ScaleRules(even).propose(driver.history, 5) == []


def test_stages_come_in_their_order_and_as_many_as_asked(problem):
    driver = driver_of(problem, summed(problem))
    effort = Effort(runners_up=4, refit=3, swaps=5)
    found = explored(problem, driver, 12, effort=effort)
    trials = driver.history.trials
    assert [t.number for t in trials] == list(range(len(trials)))
    stages = [t.stage for t in trials]
    assert stages == sorted(stages, key=list(Stage).index)
    counts = {stage: stages.count(stage) for stage in Stage}
    assert counts[Stage.BASELINE] == 4
    assert [counts[s] for s in (Stage.RUNNER_UP, Stage.REFIT, Stage.SWAP)] == [4, 3, 5]
    assert len(trials) <= most_trials(problem, 12)
    assert found.incumbent is driver.history[problem.optimum()]
    whole = {t.number for t in trials if t.fits and not t.is_stopped}
    assert {t.number for t in (found.incumbent, *found.challengers)} == whole


def test_baselines_and_optima_do_not_race_and_all_others_do(problem):
    driver = driver_of(problem, summed(problem, noise=1.0))
    explored(problem, driver, 24)
    stopped = {t.stage for t in driver.history.trials if t.is_stopped}
    assert stopped
    assert stopped <= {Stage.RUNNER_UP, Stage.REFIT, Stage.SWAP}


def test_the_bound_of_the_trials_is_reached_where_every_optimum_is_another(even):
    """Groups prefer two scale rules by turns, one of which the joint check closes."""
    turned = {"nvfp4/mse": "nvfp4/four_over_six", "nvfp4/four_over_six": "nvfp4/mse"}
    layers = {group.name: group.layer for group in even.groups}
    kl = even.sensitivity.kl
    preferring = {
        (name, choice): kl[name, Choice.parse(turned.get(str(choice), str(choice)))]
        if layers.get(name, 0) % 2
        else value
        for (name, choice), value in kl.items()
    }
    estimate = {key: value * (1 + layers.get(key[0], 0)) for key, value in kl.items()}
    sensitivity = dataclasses.replace(even.sensitivity, kl=preferring, estimate=estimate)
    problem = dataclasses.replace(even, sensitivity=sensitivity)
    joint = by_rules(four_over_six_mse=0.5, four_over_six_max=0.4, max_mse=0.6)
    driver = driver_of(problem, joint)
    explored(problem, driver, NOTHING)
    most = len(driver.history.trials)
    assert most == most_trials(problem, 0) == most_trials(problem, 9) - 9


def test_bounds_end_the_refinement_alone(problem):
    driver = driver_of(problem, summed(problem))
    explored(problem, driver, 24, Bounds(lambda: False))
    assert {t.stage for t in driver.history.trials} <= {Stage.BASELINE, Stage.SOLVER, Stage.RULES}
    assert len(driver.history.trials) >= 6


def overflowing(problem, overflows):
    """Joint KL, not a number where an assignment is named by `overflows`."""
    kl = summed(problem)
    return lambda assignment: math.nan if overflows(assignment) else kl(assignment)


def test_where_the_optimum_overflows_the_most_promising_takes_its_place(problem):
    """And so does every assignment of one scale rule or none, so that no rule is to blame."""
    driver = driver_of(problem, overflowing(problem, lambda a: len(rules_of(a)) < 2))
    found = explored(problem, driver, 8)
    assert found.problem is problem
    assert math.isnan(driver.history[problem.optimum()].kl)
    assert len(found.challengers) > 1
    assert math.isfinite(found.incumbent.kl)
    promising = Predictor(found.problem).by_promise(driver.history)
    assert (found.incumbent, *found.challengers) == tuple(promising)
    assert all(math.isfinite(t.kl) for t in found.challengers)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_overflows_never_wins_and_teaches_the_fit_nothing(problem, seed):
    """A third of all assignments overflow."""
    driver = driver_of(problem, overflowing(problem, lambda a: int(a.digest, 16) % 3 == seed))
    found = explored(problem, driver, 24)
    assert sum(math.isnan(t.kl) for t in driver.history.trials) >= 5
    assert all(math.isfinite(t.kl) for t in (found.incumbent, *found.challengers))
    assert len(driver.history.trials) >= 24


def test_nothing_that_may_win_is_an_error_that_says_so(problem):
    driver = driver_of(problem, lambda assignment: math.inf)
    with pytest.raises(SourceError, match=r"none of .* is finite") as error:
        explored(problem, driver, 8)
    assert "close the formats that overflow" in error.value.fix


def test_a_probe_that_overflows_is_avoided_where_the_budget_allows(problem):
    """Solver and fits see a KL above all others together in its place."""
    name = problem.groups[0].name
    kl = {
        key: (math.inf if key[0] == name and key[1].scale_rule is not None else value)
        for key, value in problem.sensitivity.kl.items()
    }
    sensitivity = dataclasses.replace(problem.sensitivity, kl=kl)
    assert {key[0] for key in sensitivity.overflowing()} == {name}
    bounded = dataclasses.replace(problem, sensitivity=sensitivity.bounded())
    assert bounded.optimum()[name].scale_rule is None
    driver = driver_of(bounded, overflowing(bounded, lambda a: a[name].scale_rule is not None))
    found = explored(bounded, driver, 12, FREE)
    assert found.incumbent is driver.history[bounded.optimum()]
    refined = [t for t in driver.history.trials if t.stage in (Stage.RUNNER_UP, Stage.REFIT)]
    assert refined
    assert all(math.isfinite(t.kl) for t in refined)


@pytest.mark.parametrize("trials", [0, 1, 2, 7, 60, 61, 500])
def test_trials_are_shared_out_without_rest(trials):
    effort = Effort.of(trials)
    assert effort.runners_up + effort.refit + effort.swaps == effort.trials == trials
    assert min(effort.runners_up, effort.refit, effort.swaps) >= 0
    assert effort.runners_up <= MOST_RUNNERS_UP


def test_half_of_the_trials_are_runners_up_and_refits_and_swaps_share_the_rest():
    assert Effort.of(30) == Effort(runners_up=15, refit=8, swaps=7)
    assert Effort.of(21) == Effort(runners_up=11, refit=5, swaps=5)
    many = Effort.of(3 * MOST_RUNNERS_UP)
    assert many.runners_up == many.refit == many.swaps == MOST_RUNNERS_UP


class Asked:
    """Keeps how many requests come at a time."""

    def __init__(self, evaluator):
        self.counts, self._evaluator = [], evaluator

    def measure(self, requests, coming=()):
        requests = [*requests]
        self.counts.append(len(requests))
        return self._evaluator.measure(requests)


def test_what_rests_on_no_measurement_is_asked_for_at_once(even):
    """Recipes, optima and replaced rules: a pass over streamed weights serves them all."""
    joint = by_rules(mse=0.5, max=0.4, four_over_six=0.45)
    asked = Asked(LocalEvaluator(Scored(joint), SPLIT))
    driver = driver_of(even, joint, evaluator=asked)
    explored(even, driver, NOTHING)
    closed = driver.history.trials[-1]
    assert closed.name == "optimum, rules closed"
    assert [count for count in asked.counts if count] == [len(driver.history.trials) - 1, 1]
