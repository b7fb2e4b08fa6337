"""Everything that is measured jointly on the search split, in order."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from autoquant.formats import ScaleRule
from autoquant.search.limits import Bounds
from autoquant.search.problem import Problem
from autoquant.search.propose.baselines import baselines
from autoquant.search.refine import Effort, by_promise, refine
from autoquant.search.scale_check import with_sound_rules
from autoquant.search.trials import Ledger, Stage, Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Explored:
    """What joint measurements left."""

    problem: Problem
    """With the scale rules that passed the joint check."""
    incumbent: Trial
    """The solver's optimum of that problem, which challengers have to beat."""
    challengers: tuple[Trial, ...]
    """Every other whole candidate within the budget, the most promising first."""


def most_trials(problem: Problem, trials: int) -> int:
    """An upper bound of the joint measurements, for a progress bar."""
    rules = len(ScaleRule)
    return sum(1 for _ in baselines(problem)) + 3 + rules + trials


def explore(
    problem: Problem,
    ledger: Ledger,
    effort: Effort,
    *,
    seed: int,
    bounds: Bounds,
    timed: Callable[[str], AbstractContextManager[None]],
) -> Explored:
    """Measure baselines and the solver's optimum, check the scale rules, then refine.

    Args:
        problem: what is searched.
        ledger: measures.
        effort: joint measurements of each proposer.
        seed: of the sampler.
        bounds: of the refinement.
        timed: charges the time of a block to a stage.
    """
    with timed("baselines"):
        for name, assignment in baselines(problem):
            ledger.measure(assignment, Stage.BASELINE, name)
    with timed("solve"):
        first = ledger.measure(problem.optimum(), Stage.SOLVER, "optimum")
        by_gradients = problem.by_gradients()
        if by_gradients is not None:
            ledger.measure(by_gradients.optimum(), Stage.SOLVER, "optimum of the gradients")
        max_only = problem.restricted(ScaleRule.MAX)
        if max_only is not None:
            plain = problem.decode(max_only.solve())
            ledger.measure(plain, Stage.SOLVER, "optimum, rule max only")
        sound, incumbent = with_sound_rules(problem, ledger, first)
    with timed("refine"):
        refine(sound, ledger, effort, seed=seed, bounds=bounds)
    promising = by_promise(sound, ledger)
    challengers = tuple(trial for trial in promising if trial is not incumbent)
    return Explored(problem=sound, incumbent=incumbent, challengers=challengers)
