"""Samplers by their names: Optuna's own over points that decode, and those of others."""

import json
import math

import optuna
import pytest
from joint import SPLIT, driver_of, explored, summed

from autoquant.errors import ConfigError
from autoquant.search.samplers import OPTUNA_SAMPLERS, OWN_SAMPLER
from autoquant.search.trials import Stage, Trial
from autoquant.study.sampling import OPTUNAS, POPULATION, require_sampler

TRIALS = 10


def refined(driver):
    given = (Stage.BASELINE, Stage.SOLVER, Stage.RULES)
    return [trial for trial in driver.history.trials if trial.stage not in given]


def facts(trials):
    return [json.dumps({**t.to_dict(), "seconds": 0.0}) for t in trials]


def test_what_the_settings_name_is_what_there_is():
    assert ("budget", tuple(OPTUNAS)) == (OWN_SAMPLER, OPTUNA_SAMPLERS)


@pytest.mark.parametrize("name", OPTUNA_SAMPLERS)
def test_optunas_own_propose_what_fits_and_race_as_ours_does(problem, name):
    driver = driver_of(problem, summed(problem, noise=0.5))
    explored(problem, driver, TRIALS, sampler=name)
    trials = refined(driver)
    assert len(trials) == TRIALS
    assert len({t.assignment.digest for t in driver.history.trials}) == len(driver.history.trials)
    assert all(t.fits and t.stage is Stage.REWEIGHT for t in trials)
    assert {"depth", "exponent"} < trials[0].params.keys()
    assert any(t.is_stopped for t in trials)
    assert all(driver.history.trials[t.rival].is_eligible for t in trials)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("name", OPTUNA_SAMPLERS)
def test_optunas_own_go_on_after_an_interruption(problem, name, width):
    joint = summed(problem, noise=0.5)
    whole = driver_of(problem, joint, width=width)
    explored(problem, whole, TRIALS, sampler=name)
    trials = whole.history.trials
    for kept in (3, len(trials) - 6, len(trials) - 2):
        log = [Trial.from_dict(json.loads(json.dumps(t.to_dict()))) for t in trials[:kept]]
        again = driver_of(problem, joint, earlier=log, width=width)
        explored(problem, again, TRIALS, sampler=name)
        assert facts(again.history.trials) == facts(trials)


@pytest.mark.slow
def test_samplers_differ(problem):
    found = set()
    for name in ("budget", *OPTUNA_SAMPLERS):
        driver = driver_of(problem, summed(problem))
        explored(problem, driver, 2 * POPULATION, sampler=name)
        found.add(tuple(t.assignment.digest for t in refined(driver)))
    assert len(found) == 5


class Careless(optuna.samplers.RandomSampler):
    """Knows nothing of the budget; every second trial is what it asked for first."""

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution):
        asked = sum(t.user_attrs.get("stage") == "sampler" for t in study.trials)
        labels = param_distribution.choices
        return labels[0] if asked % 3 == 0 else labels[-1] if asked % 3 == 1 else labels[1]


def test_what_does_not_fit_is_told_and_counted_and_never_wins(problem):
    """And what is measured already is not measured again."""
    driver = driver_of(problem, summed(problem))
    found = explored(problem, driver, 7, sampler=f"{__name__}:Careless")
    asked = [t for t in driver.study._study.trials if t.user_attrs["stage"] == "sampler"]
    assert len(asked) == 7
    unfit = [t for t in asked if t.constraints["bits"] > 0]
    assert len(unfit) == 2
    assert all(t.state.name == "FAIL" and t.user_attrs["tokens"] == 0 for t in unfit)
    assert all(t.user_attrs["name"].endswith("over the budget") for t in unfit)
    repeated = [t for t in asked if "repeats trial" in t.user_attrs["name"]]
    assert {t.user_attrs["tokens"] for t in repeated} == {0}
    assert len(unfit) + len(repeated) < len(asked)
    candidates = (found.incumbent, *found.challengers)
    assert all(t.fits and math.isfinite(t.kl) for t in candidates)
    measured = [t for t in driver.history.trials if t.tokens]
    assert all(t.tokens <= SPLIT.tokens for t in measured)


def test_a_sampler_of_others_goes_on_where_it_stopped(problem):
    whole = driver_of(problem, summed(problem))
    explored(problem, whole, 7, sampler=f"{__name__}:Careless")
    told = whole.study._study.trials
    kept: list[Trial] = []
    first = [t for t in whole.history.trials if t.stage is not Stage.SAMPLER]
    again = driver_of(problem, summed(problem), earlier=first, keep=kept.append)
    explored(problem, again, 7, sampler=f"{__name__}:Careless")
    assert len(kept) == 7
    assert [t.user_attrs["digest"] for t in again.study._study.trials] == [
        t.user_attrs["digest"] for t in told
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:Sampler", "No module named 'no_such_module'"),
        ("json:NoSuch", "has no attribute 'NoSuch'"),
        ("json:JSONDecoder", "is no class of an Optuna sampler"),
        ("json:loads", "is no class of an Optuna sampler"),
        (":Sampler", "Empty module name"),
    ],
)
def test_what_is_no_sampler_is_refused_before_anything_is_measured(name, said):
    with pytest.raises(ConfigError, match=said):
        require_sampler(name)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package cmaes") as error:
        require_sampler("cmaes")
    assert "pip install cmaes" in error.value.fix


@pytest.mark.parametrize("name", ["budget", *OPTUNA_SAMPLERS, "optuna.samplers:TPESampler"])
def test_there_are_samplers_of_these_names(name):
    require_sampler(name)
