"""The surrogate of one problem, fitted to what a history holds."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from autoquant.arrays import Floats
from autoquant.plan.assignment import Assignment
from autoquant.search.history import History
from autoquant.search.knapsack import Knapsack
from autoquant.search.problem import Problem
from autoquant.search.relaxation import Selection
from autoquant.search.surrogate import Surrogate
from autoquant.search.trials import Trial

_POOL = 500
"""Selections that one knapsack contributes to a ranking: some times what a search measures."""


class Options(Protocol):
    """Groups of options under a budget: what proposers know of a problem."""

    @property
    def knapsack(self) -> Knapsack:
        """Costs, the budget, and what options are thought to do alone."""

    def decode(self, selection: Selection) -> Assignment:
        """The assignment of a selection."""

    def selection(self, assignment: Assignment) -> Selection:
        """The inverse of `decode`."""

    def allows(self, assignment: Assignment) -> bool:
        """Whether every group has one of its options."""

    def label(self, group: int, option: int) -> str:
        """A group and one of its options, in words."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What a history says of a problem's own selections, in the order of the trials."""

    trials: tuple[Trial, ...]
    selections: list[Selection]
    kl: Floats
    """Nats per token, all finite, [S]."""


@dataclass(frozen=True)
class Predictor:
    """Predicts the joint KL of a problem's selections; each trial is turned into one once."""

    problem: Options
    prior: Surrogate | None = None
    """Of what is no `Problem`, which has none of its own."""
    _selections: dict[str, Selection | None] = field(default_factory=dict, repr=False)
    """By the digest of the assignment; None of what the problem's options do not allow."""

    @cached_property
    def surrogate(self) -> Surrogate:
        """From the probes alone."""
        if self.prior is not None:
            return self.prior
        assert isinstance(self.problem, Problem)
        return Surrogate.of(self.problem)

    def observed(self, history: History) -> Observed:
        """Every trial that the problem's options allow, within the budget or not.

        A KL that is not finite teaches a fit nothing and is left out.
        """
        known = [
            (trial, selection)
            for trial in history.trials
            if math.isfinite(trial.kl) and (selection := self.selection(trial)) is not None
        ]
        trials = tuple(trial for trial, _ in known)
        return Observed(trials, [s for _, s in known], np.array([trial.kl for trial in trials]))

    def selection(self, trial: Trial) -> Selection | None:
        """The options of a trial's assignment; None where the problem does not allow one."""
        assignment = trial.assignment
        if assignment.digest not in self._selections:
            is_allowed = self.problem.allows(assignment)
            found = self.problem.selection(assignment) if is_allowed else None
            self._selections[assignment.digest] = found
        return self._selections[assignment.digest]

    def fitted(self, history: History) -> Surrogate:
        """See `Surrogate.fitted`."""
        observed = self.observed(history)
        return self.surrogate.fitted(observed.selections, observed.kl)

    def refitted(self, history: History) -> Surrogate:
        """See `Surrogate.refitted`."""
        observed = self.observed(history)
        return self.surrogate.refitted(observed.selections, observed.kl)

    def by_promise(self, history: History) -> list[Trial]:
        """The eligible trials, the most promising first.

        By the mean of what was measured and what the surrogate, fitted to all that was measured,
        predicts: the least of many measurements is partly luck, which the fit does not share.
        """
        fitted, eligible = self.refitted(history), history.eligible()
        known = {t.number: s for t in eligible if (s := self.selection(t)) is not None}
        predicted = fitted.predict([*known.values()]) if known else ()
        expected = dict(zip(known, map(float, predicted), strict=True))
        return sorted(eligible, key=lambda t: (t.kl + expected.get(t.number, t.kl), t.number))


def ranked(surrogate: Surrogate, problem: Options) -> list[Selection]:
    """Selections of least predicted KL that keep and fill the budget, the best first.

    From a pool: the best of the knapsack of what each option adds alone, then of the knapsack of
    what each option adds around the best found so far, until that no longer improves.
    """
    knapsack = problem.knapsack
    found: dict[Selection, float] = {}
    scores = surrogate.by_group(surrogate.adding)
    best = math.inf
    while True:
        fresh = [s for s in knapsack.with_scores(scores).best(_POOL) if s not in found]
        if fresh:
            found.update(zip(fresh, map(float, surrogate.predict(fresh)), strict=True))
        order = sorted(found, key=lambda selection: (found[selection], selection))
        if not found[order[0]] < best:
            return order
        best = found[order[0]]
        scores = surrogate.marginal(order[0])
