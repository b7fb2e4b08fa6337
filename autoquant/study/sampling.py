"""The sampler of a refinement by its name."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import optuna
from optuna.samplers import BaseSampler

from autoquant.errors import ConfigError
from autoquant.samplers import BudgetSampler
from autoquant.samplers.schedule import Schedule, Shares
from autoquant.search.predictor import Predictor
from autoquant.search.problem import Problem
from autoquant.search.propose.reweight import Reweightings
from autoquant.search.propose.shares import Effort, shared_out
from autoquant.search.samplers import CMAES, NSGAII, OWN_SAMPLER, RANDOM, TPE
from autoquant.study.space import StudySpace

POPULATION = 10
"""Of NSGA-II: its first generation is random, and Optuna's default of 50 is more than a search
measures."""

OPTUNAS: dict[str, Callable[[int], BaseSampler]] = {
    TPE: lambda seed: optuna.samplers.TPESampler(seed=seed),
    CMAES: lambda seed: optuna.samplers.CmaEsSampler(seed=seed),
    NSGAII: lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION),
    RANDOM: lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
"""Optuna's own by their names, each with a seed."""


def sampler_of(
    name: str, predictor: Predictor, space: StudySpace, *, trials: int, width: int, seed: int
) -> BaseSampler:
    """The sampler that a search asks.

    Optuna's own sample weights of the sensitivities, by role, depth and exponent, from which the
    knapsack makes assignments that fit (`Reweightings`). A class of others samples the groups'
    choices themselves.

    Args:
        name: `budget`, one of `OPTUNAS`, or `module:Class`.
        predictor: of the problem.
        space: of the study.
        trials: of the refinement.
        width: trials that are asked for at a time.
        seed: of the sampler.

    Raises:
        ConfigError: there is no such class, it is no sampler, or a package that it needs is absent.
    """
    problem = predictor.problem
    assert isinstance(problem, Problem)
    shares: Callable[[], Shares]
    if name == OWN_SAMPLER:
        shares = partial(shared_out, predictor, Effort.of(trials))
    elif name in OPTUNAS:
        weights = partial(Reweightings, problem, trials=trials, seed=seed, sampler=OPTUNAS[name])
        shares = lambda: [(weights(), trials)]  # noqa: E731
    else:
        return _sampler_of_others(name, seed)
    return BudgetSampler.by(problem, space, lambda: Schedule(shares(), width))


def require_sampler(name: str) -> None:
    """Return if there is a sampler of the name.

    Raises:
        ConfigError: there is none.
    """
    if name == OWN_SAMPLER:
        return
    if name not in OPTUNAS:
        _sampler_of_others(name, 0)
    elif name == CMAES and importlib.util.find_spec("cmaes") is None:
        raise ConfigError(
            "--sampler cmaes needs the package cmaes, which is not installed.",
            fix="pip install cmaes, or choose another sampler.",
        )


def _sampler_of_others(name: str, seed: int) -> BaseSampler:
    """An object of the class `module:Class`, with the seed where it takes one."""
    module, _, attribute = name.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--sampler {name}: {error}.",
            fix="name a module:Class that Python can import (PYTHONPATH says from where).",
        ) from error
    if not inspect.isclass(made) or not issubclass(made, BaseSampler):
        raise ConfigError(
            f"--sampler {name} is no class of an Optuna sampler.",
            fix="name a subclass of optuna.samplers.BaseSampler.",
        )
    takes_seed = "seed" in inspect.signature(made).parameters
    sampler: BaseSampler = made(**({"seed": seed} if takes_seed else {}))
    return sampler
