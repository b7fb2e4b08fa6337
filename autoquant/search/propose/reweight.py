"""Optuna over a few parameters that reweight the sensitivities before the knapsack is solved again.

Every candidate is feasible and fills the budget by construction; a categorical per group would
leave a sampler without a single feasible trial.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from autoquant.formats import BF16, Choice
from autoquant.plan.assignment import Assignment
from autoquant.plan.linears import LayerGroup
from autoquant.search.limits import Bounds
from autoquant.search.problem import Problem
from autoquant.search.trials import Ledger, Stage

ASKS_PER_TRIAL = 8
"""Reweightings that decode to a known assignment cost nothing, but must end some time."""


def reweight(problem: Problem, ledger: Ledger, count: int, seed: int, bounds: Bounds) -> None:
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
        if not bounds.allow(ledger, assignment):
            return
        measured += not ledger.has(assignment)
        name = f"ask {ask}"
        result = ledger.measure(assignment, Stage.REWEIGHT, name, params, rival=ledger.best())
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
