"""Predicted joint KL of an assignment, from probes alone and from measured candidates.

The sum of the parts' own KL d_i, plus a strength times sum_{i<j} 2 rho_ij sqrt(d_i d_j), rho_ij the
correlation of the output changes of two parts. To second order the strength is 1. Where parts do
the same harm (a token whose routing any of them flips) correlated parts cost less together than
apart, and it is negative. So it is fitted on measured candidates, with a power law a x^b for what
the expansion misses (saturation); the law is monotone and never reorders.

Shapes: G groups, N options of all groups together, S selections.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from autoquant.search.knapsack_bounds import Selection
from autoquant.search.problem import Problem

Floats = np.ndarray[Any, np.dtype[np.float64]]
Indices = np.ndarray[Any, np.dtype[np.int64]]

STRENGTHS = tuple(round(0.05 * step, 2) for step in range(-10, 25))
FEWEST_TO_FIT = 6
"""Measured candidates below which interactions are left out."""


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """The monotone map x -> scale * x ** exponent."""

    scale: float = 1.0
    exponent: float = 1.0

    def __call__(self, x: Floats) -> Floats:
        return np.asarray(self.scale * np.maximum(x, 0.0) ** self.exponent)

    @classmethod
    def fitted(cls, x: Floats, y: Floats) -> "PowerLaw":
        """Least squares of logarithms; the identity without a positive pair.

        The exponent is held to [0.5, 1.5], and to 1 where x hardly varies.
        """
        known = (x > 0.0) & (y > 0.0)
        if not known.any():
            return cls()
        u, v = np.log(x[known]), np.log(y[known])
        spread = u - u.mean()
        exponent = 1.0
        if len(u) >= 3 and np.abs(spread).max() > 0.1:
            exponent = float(np.clip((spread @ (v - v.mean())) / (spread @ spread), 0.5, 1.5))
        return cls(math.exp(float(v.mean() - exponent * u.mean())), exponent)


@dataclass(frozen=True)
class Surrogate:
    """A quadratic in the chosen options, and a monotone map of it."""

    sizes: tuple[int, ...]
    """Options of each group."""
    main: Floats
    """What each option costs alone, nats per token, [N]."""
    pairs: Floats
    """What two options cost beyond that to second order, nats per token, [N, N]; symmetric, zero
    within a group."""
    strength: float = 0.0
    """What `pairs` are multiplied with."""
    law: PowerLaw = field(default_factory=PowerLaw)
    correction: Floats | None = None
    """What measured candidates add to each option, nats per token, [N]."""

    @classmethod
    def of(cls, problem: Problem, *, with_pairs: bool = True) -> "Surrogate":
        """From the problem's sensitivities, and their interactions where they were measured."""
        scores = problem.knapsack.scores
        main = np.array([s for options in scores for s in options], dtype=np.float64)
        pairs = np.zeros((len(main), len(main)))
        interactions = problem.sensitivity.interactions
        if with_pairs and interactions is not None:
            lengths = np.sqrt(np.maximum(main, 0.0))
            group = np.repeat(np.arange(len(scores)), [len(options) for options in scores])
            apart = group[:, None] != group[None, :]
            pairs = 2.0 * interactions.of(problem.keys) * np.outer(lengths, lengths) * apart
        return cls(tuple(len(options) for options in scores), main, pairs)

    @cached_property
    def offsets(self) -> Indices:
        """Place of each group's first option, [G]."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)

    def places(self, selections: Sequence[Selection]) -> Indices:
        """Place of each chosen option, [S, G]."""
        return np.asarray(np.array(selections, dtype=np.int64) + self.offsets)

    def quadratic(self, selections: Sequence[Selection]) -> Floats:
        """Nats per token before the map, [S]."""
        places = self.places(selections)
        return _joined(self._alone(places), self._interaction(places), self.strength)

    def predict(self, selections: Sequence[Selection]) -> Floats:
        """Expected joint KL, nats per token, [S]."""
        predicted = self.law(self.quadratic(selections))
        if self.correction is not None:
            predicted = predicted + self.correction[self.places(selections)].sum(axis=1)
        return predicted

    def marginal(self, selection: Selection) -> tuple[tuple[float, ...], ...]:
        """What each option of each group would add with the other groups as selected.

        The scores of a knapsack whose optimum improves the quadratic around `selection`.
        """
        places = self.places([selection])[0]
        slope = self.law.scale * self.law.exponent
        slope *= max(float(self.quadratic([selection])[0]), 1e-300) ** (self.law.exponent - 1.0)
        values = slope * (self.main + self.strength * self.pairs[:, places].sum(axis=1))
        if self.correction is not None:
            values = values + self.correction
        ends = [*self.offsets[1:], len(values)]
        return tuple(
            tuple(map(float, values[a:b])) for a, b in zip(self.offsets, ends, strict=True)
        )

    def fitted(self, selections: Sequence[Selection], kl: Floats) -> "Surrogate":
        """With strength and map fitted on measured candidates and their KL, nats per token, [S].

        Least squares of logarithms, with as little strength as explains them about as well.
        """
        places = self.places(selections)
        alone, interaction = self._alone(places), self._interaction(places)
        best, law, strength = math.inf, PowerLaw(), 0.0
        for candidate in sorted(STRENGTHS, key=abs) if len(kl) >= FEWEST_TO_FIT else (0.0,):
            joined = _joined(alone, interaction, candidate)
            fit = PowerLaw.fitted(joined, kl)
            error = _log_error(fit(joined), kl)
            if error < 0.9 * best:
                best, law, strength = error, fit, candidate
        return replace(self, strength=strength, law=law, correction=None)

    def refitted(self, selections: Sequence[Selection], kl: Floats) -> "Surrogate":
        """Fitted, with a correction per option learned from what the fit leaves over.

        Bayesian linear regression: corrections have a prior deviation in proportion to their
        option's own KL, residuals one in proportion to the mean KL; both proportions are those of
        the highest marginal likelihood on a grid (Rasmussen and Williams, Gaussian Processes for
        Machine Learning, 2006, ch. 2 and 5).
        """
        base = self.fitted(selections, kl)
        places = self.places(selections)
        residual = kl - base.law(base.quadratic(selections))
        deviation = np.hypot(self.main, 0.01 * self.main.max())
        chosen = np.zeros((len(places), len(self.main)))
        np.put_along_axis(chosen, places, 1.0, axis=1)
        weighted = chosen * deviation
        gram, level = weighted @ weighted.T, float(kl.mean())
        covariances = [
            (prior, prior**2 * gram + (noise * level) ** 2 * np.eye(len(gram)))
            for prior in (0.02, 0.05, 0.1, 0.2, 0.4)
            for noise in (0.002, 0.005, 0.01, 0.02, 0.05)
        ]
        prior, covariance = min(covariances, key=lambda pc: _negative_evidence(pc[1], residual))
        weights = weighted.T @ np.linalg.solve(covariance, residual)
        return replace(base, correction=np.asarray(prior**2 * deviation * weights))

    def _alone(self, places: Indices) -> Floats:
        return np.asarray(self.main[places].sum(axis=1))

    def _interaction(self, places: Indices) -> Floats:
        total = np.zeros(len(places))
        for g in range(len(self.sizes) - 1):
            total += self.pairs[places[:, g, None], places[:, g + 1 :]].sum(axis=1)
        return total


def ranked(
    surrogate: Surrogate, problem: Problem, count: int, *, pool: int = 500
) -> list[Selection]:
    """Up to `count` selections of least predicted KL that keep and fill the budget.

    The pool: the best of the knapsack of single scores, then of the knapsack of what each option
    adds around the best found so far, until that no longer improves.
    """
    knapsack = problem.knapsack
    found: dict[Selection, float] = {}
    centre, best = None, math.inf
    while True:
        scores = knapsack.scores if centre is None else surrogate.marginal(centre)
        fresh = [s for s in knapsack.with_scores(scores).best(pool) if s not in found]
        if fresh:
            found.update(zip(fresh, map(float, surrogate.predict(fresh)), strict=True))
        leader = min(found, key=lambda s: (found[s], s))
        if centre is not None and not found[leader] < best:
            return sorted(found, key=lambda s: (found[s], s))[:count]
        centre, best = leader, found[leader]


def _joined(alone: Floats, interaction: Floats, strength: float) -> Floats:
    """Never below a tenth of the sum, where negative strengths would lead it."""
    return np.maximum(alone + strength * interaction, 0.1 * alone)


def _log_error(predicted: Floats, measured: Floats) -> float:
    known = (predicted > 0.0) & (measured > 0.0)
    return float(np.sum(np.log(predicted[known] / measured[known]) ** 2))


def _negative_evidence(covariance: Floats, residual: Floats) -> float:
    _, logdet = np.linalg.slogdet(covariance)
    return float(residual @ np.linalg.solve(covariance, residual) + logdet)
