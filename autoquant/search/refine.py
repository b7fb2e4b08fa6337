"""Candidates beyond the solver's optimum, measured jointly.

Three proposers share the trials: runners-up of the knapsack in its own order, Optuna over a few
parameters that reweight the sensitivities before the knapsack is solved again, and swaps of single
groups around the best. Every candidate is feasible and fills the budget by construction; a
categorical per group would leave a sampler without a single feasible trial.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoquant.assignment import Assignment
from autoquant.formats import BF16, Choice
from autoquant.groups import LayerGroup
from autoquant.search.problem import Problem
from autoquant.search.solver import Selection
from autoquant.search.trials import Ledger, Stage, Trial

MOST_RUNNERS_UP = 30
"""One optimum of the knapsack is 7 % above the best measured; the best of its 30 is the best."""

ASKS_PER_TRIAL = 8
"""Reweightings that decode to a known assignment cost nothing, but must end some time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How many new joint measurements each proposer may make."""

    runners_up: int
    reweight: int
    swaps: int

    @classmethod
    def of(cls, trials: int) -> "Effort":
        """Split a number of trials: up to 30 runners-up, then two reweightings for each swap."""
        runners_up = min(MOST_RUNNERS_UP, math.ceil(trials / 2))
        swaps = (trials - runners_up) // 3
        return cls(runners_up=runners_up, reweight=trials - runners_up - swaps, swaps=swaps)


def refine(
    problem: Problem,
    ledger: Ledger,
    effort: Effort,
    *,
    seed: int,
    in_time: Callable[[], bool],
) -> None:
    """Let every proposer measure its share; no new measurement begins once `in_time` says no."""
    _runners_up(problem, ledger, effort.runners_up, in_time)
    _reweight(problem, ledger, effort.reweight, seed, in_time)
    _swap(problem, ledger, effort.swaps, in_time)


def _runners_up(problem: Problem, ledger: Ledger, count: int, in_time: Callable[[], bool]) -> None:
    for rank, selection in enumerate(problem.knapsack.best(count + 1), start=1):
        assignment = problem.decode(selection)
        if not (ledger.is_measured(assignment) or in_time()):
            return
        ledger.measure(assignment, Stage.RUNNER_UP, f"rank {rank}")


def _reweight(
    problem: Problem, ledger: Ledger, count: int, seed: int, in_time: Callable[[], bool]
) -> None:
    """Ask Optuna for reweightings until `count` new assignments are measured.

    The sampler of ask n is seeded from (seed, n) alone, so that a resumed search asks the same.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize")
    measured = 0
    for ask in range(count * ASKS_PER_TRIAL):
        if measured >= count:
            return
        entropy = np.random.SeedSequence([seed, ask]).generate_state(1)[0]
        study.sampler = optuna.samplers.TPESampler(seed=int(entropy))
        trial = study.ask()
        params = _suggest(trial, problem)
        assignment = _decode(problem, params)
        if not (ledger.is_measured(assignment) or in_time()):
            return
        measured += not ledger.has(assignment)
        result = ledger.measure(assignment, Stage.REWEIGHT, f"ask {ask}", params)
        study.tell(trial, result.kl)


def _suggest(trial: Any, problem: Problem) -> dict[str, float]:
    roles = sorted({group.role for group in problem.groups})
    params = {f"role.{role}": trial.suggest_float(f"role.{role}", -1.5, 1.5) for role in roles}
    params["depth"] = trial.suggest_float("depth", -1.5, 1.5)
    params["exponent"] = trial.suggest_float("exponent", 0.5, 1.5)
    return params


def _decode(problem: Problem, params: Mapping[str, float]) -> Assignment:
    """The knapsack's optimum for sensitivities reweighted by role, depth and exponent."""
    layers = [group.layer for group in problem.groups if group.layer is not None]
    last = max(layers, default=0) or 1

    def score(group: LayerGroup, choice: Choice) -> float:
        kl = problem.sensitivity[group.name, choice]
        if choice == BF16 or kl <= 0.0:
            return 0.0
        depth = 0.5 if group.layer is None else group.layer / last
        weight = params[f"role.{group.role}"] + params["depth"] * (depth - 0.5)
        return float(kl ** params["exponent"] * math.exp(weight))

    return problem.decode(problem.knapsack.with_scores(problem.scores(score)).solve())


def _swap(problem: Problem, ledger: Ledger, count: int, in_time: Callable[[], bool]) -> None:
    """Walk from the best to a better neighbour as long as there is one."""
    while count > 0:
        centre = ledger.best()
        improved = False
        for name, assignment in _neighbours(problem, centre):
            if ledger.has(assignment):
                continue
            if count <= 0 or not (ledger.is_measured(assignment) or in_time()):
                return
            count -= 1
            if ledger.measure(assignment, Stage.SWAP, name).kl < centre.kl:
                improved = True
                break
        if not improved:
            return


def _neighbours(problem: Problem, centre: Trial) -> Iterator[tuple[str, Assignment]]:
    """Single changes of the centre, refilled to the budget, in order of predicted KL."""
    knapsack, selection = problem.knapsack, problem.selection(centre.assignment)
    found: dict[Selection, str] = {}
    for g, group in enumerate(problem.groups):
        for option in range(len(knapsack.costs[g])):
            if option != selection[g]:
                changed = knapsack.around(selection, g, option)
                if changed is not None and changed != selection:
                    choice = problem.accounting.choices[group.name][option]
                    found.setdefault(changed, f"{group.name} to {choice}")
    for changed in sorted(found, key=knapsack.score):
        yield found[changed], problem.decode(changed)
