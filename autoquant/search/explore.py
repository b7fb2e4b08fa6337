"""Everything that is measured jointly on the search split, in order."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from autoquant.errors import SourceError
from autoquant.search.driver import Driver
from autoquant.search.limits import Bounds
from autoquant.search.predictor import Predictor
from autoquant.search.problem import Problem
from autoquant.search.propose.baselines import baselines
from autoquant.search.propose.optima import optima
from autoquant.search.propose.predicted import Refits, RunnersUp
from autoquant.search.propose.proposal import Listed
from autoquant.search.propose.reweight import Reweightings
from autoquant.search.propose.scale_rules import ScaleRules, ways_of
from autoquant.search.propose.swaps import Swaps
from autoquant.search.trials import Stage, Trial

MOST_RUNNERS_UP = 30
"""One optimum of the knapsack is 7 % above the best measured; the best of its 30 is the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How many new joint measurements each proposer of the refinement may have."""

    runners_up: int
    reweight: int
    refit: int
    swaps: int

    @classmethod
    def of(cls, trials: int, *, reweight: int = 0) -> "Effort":
        """Split a number of trials: half runners-up, and a quarter each to refits and swaps.

        Args:
            trials: all of them.
            reweight: how many of them Optuna has.
        """
        reweight = min(reweight, trials)
        runners_up = min(MOST_RUNNERS_UP, math.ceil((trials - reweight) / 2))
        swaps = (trials - reweight - runners_up) // 2
        refit = trials - reweight - runners_up - swaps
        return cls(runners_up=runners_up, reweight=reweight, refit=refit, swaps=swaps)


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
    effort: Effort,
    *,
    seed: int,
    bounds: Bounds,
    timed: Callable[[str], AbstractContextManager[None]],
) -> Explored:
    """Measure baselines and the solver's optima, check scale rules and roundings, then refine.

    Args:
        problem: what is searched.
        driver: measures into its history.
        effort: joint measurements of each proposer.
        seed: of the sampler.
        bounds: of the refinement.
        timed: charges the time of a block to a stage.

    Raises:
        SourceError: no assignment within the budget has a finite KL.
    """
    history = driver.history
    with timed("baselines"):
        driver.run(Listed(Stage.BASELINE, baselines(problem)))
    with timed("solve"):
        driver.run(Listed(Stage.SOLVER, optima(problem)))
        rules = ScaleRules(problem)
        driver.run(rules)
        sound, incumbent = rules.verdict(history)
    predictor = Predictor(sound)
    with timed("refine"):
        refine(predictor, driver, effort, seed=seed, bounds=bounds)
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


def refine(
    predictor: Predictor, driver: Driver, effort: Effort, *, seed: int, bounds: Bounds
) -> None:
    """Let each proposer have its share measured; nothing new begins beyond the bounds.

    Proposers share the trials: the assignments of least predicted KL, with the interactions of the
    groups; on request, Optuna over reweighted sensitivities; the optima of a surrogate that is
    refitted to what was measured; swaps of one or two groups around the best.
    """
    reweightings = Reweightings(predictor.problem, trials=effort.reweight, seed=seed)
    for proposer, most in (
        (RunnersUp(predictor), effort.runners_up),
        (reweightings, effort.reweight),
        (Refits(predictor), effort.refit),
        (Swaps(predictor), effort.swaps),
    ):
        if not driver.run(proposer, most=most, bounds=bounds):
            return
