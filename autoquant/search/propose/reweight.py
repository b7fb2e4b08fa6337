"""Optuna over a few parameters that reweight the sensitivities before the knapsack is solved again.

Every candidate is feasible and fills the budget by construction; a categorical per group would
leave a sampler without a single feasible trial.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from autoquant.formats import BF16, Choice
from autoquant.plan.assignment import Assignment
from autoquant.plan.linears import LayerGroup
from autoquant.search.history import History
from autoquant.search.problem import Problem
from autoquant.search.propose.proposal import Proposal
from autoquant.search.quiet import quietly
from autoquant.search.trials import Stage

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

ASKS_PER_TRIAL = 8
"""Reweightings that decode to a known assignment cost nothing, but must end some time."""


class Reweightings:
    """Proposes what Optuna's sampler asks for.

    The sampler of ask n is seeded from (seed, n) alone, so that a resumed search asks the same.

    Args:
        problem: what is searched.
        trials: how many will be measured at most.
        seed: of the sampler.
        sampler: makes Optuna's sampler from a seed.
    """

    def __init__(
        self, problem: Problem, *, trials: int, seed: int, sampler: "Callable[[int], BaseSampler]"
    ) -> None:
        self._problem, self._seed, self._sampler = problem, seed, sampler
        self._asks = iter(range(trials * ASKS_PER_TRIAL))
        self._untold: list[tuple[Any, Assignment]] = []
        """Optuna's trials whose assignments are proposed and not measured."""

    @cached_property
    def _study(self) -> Any:
        import optuna

        with quietly():
            return optuna.create_study(direction="minimize")

    def propose(self, history: History, count: int) -> Sequence[Proposal]:
        self._tell(history)
        found: dict[str, Proposal] = {}
        while len(found) < count and (ask := next(self._asks, None)) is not None:
            trial = self._ask(ask)
            params = _suggest(trial, self._problem)
            assignment = _decode(self._problem, params)
            self._untold.append((trial, assignment))
            if assignment in history:
                self._tell(history)
                continue
            proposal = Proposal(
                assignment=assignment,
                stage=Stage.REWEIGHT,
                name=f"ask {ask}",
                params=params,
                rival=history.best(),
            )
            found.setdefault(assignment.digest, proposal)
        return list(found.values())

    def _ask(self, number: int) -> Any:
        entropy = np.random.SeedSequence([self._seed, number]).generate_state(1)[0]
        self._study.sampler = self._sampler(int(entropy))
        return self._study.ask()

    def _tell(self, history: History) -> None:
        """Tell the study what is measured of what it asked for."""
        from optuna.trial import TrialState

        for trial, assignment in self._untold:
            if assignment in history:
                kl = history[assignment].kl
                if math.isfinite(kl):
                    self._study.tell(trial, kl)
                else:
                    self._study.tell(trial, state=TrialState.FAIL)
        self._untold = [(t, a) for t, a in self._untold if a not in history]


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
