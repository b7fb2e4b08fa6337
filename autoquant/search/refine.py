"""Candidates beyond the solver's optimum, measured jointly.

Proposers share the trials: the assignments of least predicted KL, with the interactions of the
groups; the optimum of a surrogate that is refitted on what was measured; swaps of one or two groups
around the best; and, on request, Optuna over reweighted sensitivities.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from autoquant.arrays import Floats
from autoquant.search.limits import Bounds
from autoquant.search.problem import Problem
from autoquant.search.propose.reweight import reweight
from autoquant.search.propose.swaps import neighbours
from autoquant.search.relaxation import Selection
from autoquant.search.surrogate import Surrogate, ranked
from autoquant.search.trials import Ledger, Stage, Trial

MOST_RUNNERS_UP = 30
"""One optimum of the knapsack is 7 % above the best measured; the best of its 30 is the best."""

REFIT_EVERY = 5
"""Candidates measured between two fits of the surrogate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How many new joint measurements each proposer may make."""

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


def refine(problem: Problem, ledger: Ledger, effort: Effort, *, seed: int, bounds: Bounds) -> None:
    """Let every proposer measure its share; nothing new begins beyond the bounds."""
    surrogate = Surrogate.of(problem)
    _runners_up(problem, ledger, surrogate, effort.runners_up, bounds)
    reweight(problem, ledger, effort.reweight, seed, bounds)
    _refit(problem, ledger, surrogate, effort.refit, bounds)
    _swap(problem, ledger, surrogate, effort.swaps, bounds)


def measured(problem: Problem, ledger: Ledger) -> tuple[list[Selection], Floats]:
    """Every candidate that the problem's options allow, within the budget or not, and its KL."""
    known = [trial for trial in ledger.trials if problem.allows(trial.assignment)]
    return [problem.selection(t.assignment) for t in known], np.array([t.kl for t in known])


def by_promise(problem: Problem, ledger: Ledger) -> list[Trial]:
    """Whole candidates within the budget, the most promising first.

    By the mean of what was measured and what the surrogate, fitted to all that was measured,
    predicts: the least of many measurements is partly luck, which the fit does not share.
    """
    fitted = Surrogate.of(problem).refitted(*measured(problem, ledger))
    whole = ledger.whole()
    known = [trial for trial in whole if problem.allows(trial.assignment)]
    predicted = fitted.predict([problem.selection(t.assignment) for t in known]) if known else ()
    expected = dict(zip((t.number for t in known), map(float, predicted), strict=True))
    return sorted(whole, key=lambda t: (t.kl + expected.get(t.number, t.kl), t.number))


def _runners_up(
    problem: Problem, ledger: Ledger, surrogate: Surrogate, count: int, bounds: Bounds
) -> None:
    fitted = surrogate.fitted(*measured(problem, ledger))
    best = ranked(fitted, problem, count + len(ledger.trials))
    _measure_fresh(problem, ledger, best, count, Stage.RUNNER_UP, bounds)


def _refit(
    problem: Problem, ledger: Ledger, surrogate: Surrogate, count: int, bounds: Bounds
) -> None:
    """Measure what the fitted surrogate holds for best, and fit again."""
    for start in range(0, count, REFIT_EVERY):
        fitted = surrogate.refitted(*measured(problem, ledger))
        best = ranked(fitted, problem, REFIT_EVERY + len(ledger.trials))
        step = min(REFIT_EVERY, count - start)
        if not _measure_fresh(problem, ledger, best, step, Stage.REFIT, bounds):
            return


def _measure_fresh(
    problem: Problem,
    ledger: Ledger,
    selections: Iterable[Selection],
    count: int,
    stage: Stage,
    bounds: Bounds,
) -> bool:
    """Measure the first `count` selections that were not yet; whether the bounds allowed it."""
    for rank, selection in enumerate(selections, start=1):
        assignment = problem.decode(selection)
        if ledger.has(assignment):
            continue
        if count <= 0:
            break
        if not bounds.allow(ledger, assignment):
            return False
        ledger.measure(assignment, stage, f"rank {rank}", rival=ledger.best())
        count -= 1
    return True


def _swap(
    problem: Problem, ledger: Ledger, surrogate: Surrogate, count: int, bounds: Bounds
) -> None:
    """Walk from the best to a better neighbour as long as there is one.

    The best of all may use a scale rule that the joint check has closed since; the walk begins at
    the best that does not.
    """
    while count > 0:
        allowed = [trial for trial in ledger.whole() if problem.allows(trial.assignment)]
        centre = min(allowed, key=lambda trial: (trial.kl, trial.number))
        fitted = surrogate.refitted(*measured(problem, ledger))
        improved = False
        for name, assignment in neighbours(problem, fitted, centre.assignment):
            if ledger.has(assignment):
                continue
            if count <= 0 or not bounds.allow(ledger, assignment):
                return
            count -= 1
            trial = ledger.measure(assignment, Stage.SWAP, name, rival=centre)
            if not trial.is_stopped and trial.kl < centre.kl:
                improved = True
                break
        if not improved:
            return
