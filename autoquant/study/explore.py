"""Everything that is measured jointly on the search split, in order."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from optuna.samplers import BaseSampler

from autoquant.errors import SourceError
from autoquant.search.limits import Bounds
from autoquant.search.predictor import Predictor
from autoquant.search.problem import Problem
from autoquant.search.propose.baselines import baselines
from autoquant.search.propose.optima import optima
from autoquant.search.propose.proposal import Given, Listed
from autoquant.search.propose.scale_rules import ScaleRules, ways_of
from autoquant.search.trials import Stage, Trial
from autoquant.study.driver import Driver

SamplerOf = Callable[[Predictor], BaseSampler]
"""Makes the sampler of the refinement, for the problem that passed the joint check."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explored:
    """What joint measurements left."""

    problem: Problem
    """With the scale rules and roundings that passed the joint check."""
    incumbent: Trial
    """The solver's optimum of that problem, which challengers have to beat; where the model
    overflows in it, the most promising candidate."""
    challengers: tuple[Trial, ...]
    """Every other candidate that may win, the most promising first."""


def most_trials(problem: Problem, trials: int) -> int:
    """An upper bound of the joint measurements, for a progress bar."""
    return sum(1 for _ in baselines(problem)) + 3 + len(ways_of(problem)) + trials


def explore(
    problem: Problem,
    driver: Driver,
    sampler_of: SamplerOf,
    *,
    trials: int,
    bounds: Bounds,
    timed: Callable[[str], AbstractContextManager[None]],
) -> Explored:
    """Measure baselines and the solver's optima, check scale rules and roundings, then refine.

    Args:
        problem: what is searched.
        driver: measures into its history.
        sampler_of: makes the sampler of the refinement.
        trials: of the refinement, for a sampler that has no end of its own.
        bounds: of the refinement.
        timed: charges the time of a block to a stage.

    Raises:
        SourceError: no assignment within the budget has a finite KL.
    """
    history, rules = driver.history, ScaleRules(problem)
    with timed("solve"):
        driver.run(
            Given(
                (
                    Listed(Stage.BASELINE, baselines(problem)),
                    Listed(Stage.SOLVER, optima(problem)),
                    Listed(Stage.RULES, rules.replacements()),
                )
            )
        )
        driver.run(rules)
        sound, incumbent = rules.verdict(history)
    predictor = Predictor(sound)
    with timed("refine"):
        driver.study.sample_by(sampler_of(predictor))
        driver.sample(trials, bounds)
    promising = predictor.by_promise(history)
    if not promising:
        raise SourceError(
            f"the KL of none of {len(history.trials)} measured assignments within the budget is "
            "finite: the quantized model's output overflows.",
            fix="close the formats that overflow in the search space; `autoquant report` names "
            "what each group does alone.",
        )
    incumbent = incumbent if incumbent.is_eligible else promising[0]
    challengers = tuple(trial for trial in promising if trial is not incumbent)
    return Explored(problem=sound, incumbent=incumbent, challengers=challengers)
