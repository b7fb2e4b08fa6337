"""Predicted joint KL of an assignment, from probes alone and from measured candidates.

The sum of the parts' own KL d_i, plus a strength times sum_{i<j} 2 rho_ij sqrt(d_i d_j), rho_ij the
correlation of the output changes of two parts. To second order the strength is 1. Where parts do
the same harm (a token whose routing any of them flips) they cost less together than apart: of what
a part's KL exceeds its gradient estimate by, only a share adds up (a third to three quarters on the
bundled mixture of experts), and the strength may be negative. Both are fitted on measured
candidates, with a power law a x^b for what the expansion misses (saturation); the law is monotone
and never reorders.

Shapes: G groups, N options of all groups together, S selections.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from autoquant.arrays import Floats, Integers
from autoquant.search.problem import Problem
from autoquant.search.relaxation import Selection

STRENGTHS = tuple(sorted((round(0.05 * step, 2) for step in range(-10, 25)), key=abs))
"""Weakest first: from half of the interactions' amount the other way to beyond the expansion's 1.
Half a step moves the predictions of the bundled model's trials by 0.3 % on average; its fits err by
one."""
SHARES = tuple(round(1.0 - 0.05 * step, 2) for step in range(21))
"""From all to nothing; half a step moves those predictions by 0.1 %."""
ABOUT_AS_WELL = 1.1
"""So many times the least squared error is no reason for a more involved fit: with thirty
measurements that is a likelihood ratio of 1.1 ** 15 = 4."""
FEWEST_TO_FIT = 6
"""Measured candidates below which strength and share stay as they are: with the law's two numbers
the fit has four, and needs more than four measurements."""
LEAST_OF_SUM = 0.1
"""Of what parts do alone, the least that interactions leave: keeps predictions above zero, where a
strength that is tried and does not fit would lead below."""
EXPONENTS = 0.5, 1.5
"""Bounds of the law's. A KL grows with the square of a change; where its kinks count (routing,
rounding anew) with its size, which is the square root of the sum. The other bound mirrors it."""
LEAST_SPREAD = 0.1
"""Of the logarithms of the sums, a tenth: over less an exponent would be fitted to noise."""
PRIORS = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Deviation of an option's correction, of its own KL: by what probes of single groups err."""
NOISES = (0.002, 0.005, 0.01, 0.02, 0.05)
"""Deviation of a measured KL from the fit, of the mean KL. Either grid about doubles at each step;
finer steps raise the evidence's logarithm by less than 2 on the bundled model."""
LEAST_DEVIATION = 0.01
"""Of the largest KL of an option: what an option that does nothing alone may be corrected by."""


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

        The exponent is 1 where x hardly varies.
        """
        known = (x > 0.0) & (y > 0.0)
        if not known.any():
            return cls()
        u, v = np.log(x[known]), np.log(y[known])
        spread = u - u.mean()
        exponent = 1.0
        if len(u) >= 3 and np.abs(spread).max() > LEAST_SPREAD:
            exponent = float(np.clip((spread @ (v - v.mean())) / (spread @ spread), *EXPONENTS))
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
    excess: Floats
    """What of `main` gradients do not see, nats per token, [N]; zero without gradients."""
    strength: float = 0.0
    """What `pairs` are multiplied with."""
    share: float = 1.0
    """What `excess` is multiplied with where parts are added up."""
    law: PowerLaw = field(default_factory=PowerLaw)
    correction: Floats | None = None
    """What measured candidates add to each option, nats per token, [N]."""

    @classmethod
    def of(cls, problem: Problem, *, with_pairs: bool = True) -> "Surrogate":
        """From the problem's sensitivities, and their interactions where they were measured."""
        main = _flat(problem.knapsack.scores)
        by_gradients = problem.by_gradients()
        seen = main if by_gradients is None else _flat(by_gradients.knapsack.scores)
        pairs = np.zeros((len(main), len(main)))
        interactions = problem.sensitivity.interactions
        sizes = tuple(len(options) for options in problem.knapsack.scores)
        if with_pairs and interactions is not None:
            lengths = np.sqrt(np.maximum(main, 0.0))
            group = np.repeat(np.arange(len(sizes)), sizes)
            apart = group[:, None] != group[None, :]
            pairs = 2.0 * interactions.of(problem.keys) * np.outer(lengths, lengths) * apart
        return cls(sizes, main, pairs, np.maximum(main - seen, 0.0))

    @cached_property
    def offsets(self) -> Integers:
        """Place of each group's first option, [G]."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)

    def places(self, selections: Sequence[Selection]) -> Integers:
        """Place of each chosen option, [S, G]."""
        options = np.array(selections, dtype=np.int64).reshape(-1, len(self.sizes))
        return np.asarray(options + self.offsets)

    @property
    def adding(self) -> Floats:
        """What each option adds to the sum, nats per token, [N]."""
        return np.asarray(self.main - (1.0 - self.share) * self.excess)

    def by_group(self, values: Floats) -> tuple[tuple[float, ...], ...]:
        """Numbers of all options [N] as the scores of a knapsack."""
        return tuple(tuple(map(float, own)) for own in np.split(values, self.offsets[1:]))

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
        values = slope * (self.adding + self.strength * self.pairs[:, places].sum(axis=1))
        return self.by_group(values if self.correction is None else values + self.correction)

    def fitted(self, selections: Sequence[Selection], kl: Floats) -> "Surrogate":
        """With strength, share and map fitted on measured candidates' KL, nats per token, [S].

        Least squares of logarithms; of all that explain the candidates about as well as the best
        does, the one of least strength, and among those the one of most share.
        """
        places = self.places(selections)
        interaction, excess = self._interaction(places), self.excess[places].sum(axis=1)
        whole = self.main[places].sum(axis=1)
        enough = len(kl) >= FEWEST_TO_FIT
        fits = []
        for strength, share in itertools.product(
            STRENGTHS if enough and interaction.any() else (0.0,),
            SHARES if enough and excess.any() else (1.0,),
        ):
            joined = _joined(whole - (1.0 - share) * excess, interaction, strength)
            law = PowerLaw.fitted(joined, kl)
            fits.append((_log_error(law(joined), kl), strength, share, law))
        least = min(error for error, *_ in fits)
        _, strength, share, law = next(fit for fit in fits if fit[0] <= ABOUT_AS_WELL * least)
        return replace(self, strength=strength, share=share, law=law, correction=None)

    def refitted(self, selections: Sequence[Selection], kl: Floats) -> "Surrogate":
        """Fitted, with a correction per option learned from what the fit leaves over.

        Bayesian linear regression: corrections have a prior deviation in proportion to their
        option's own KL, residuals one in proportion to the mean KL; both proportions are those of
        the highest marginal likelihood on a grid (Rasmussen and Williams, Gaussian Processes for
        Machine Learning, 2006, ch. 2 and 5).
        """
        base = self.fitted(selections, kl)
        if not len(kl):
            return base
        places = self.places(selections)
        residual = kl - base.law(base.quadratic(selections))
        deviation = np.hypot(self.main, LEAST_DEVIATION * self.main.max())
        chosen = np.zeros((len(places), len(self.main)))
        np.put_along_axis(chosen, places, 1.0, axis=1)
        weighted = chosen * deviation
        gram, level = weighted @ weighted.T, float(kl.mean())
        covariances = [
            (prior, prior**2 * gram + (noise * level) ** 2 * np.eye(len(gram)))
            for prior in PRIORS
            for noise in NOISES
        ]
        prior, covariance = min(covariances, key=lambda pc: _negative_evidence(pc[1], residual))
        weights = weighted.T @ np.linalg.solve(covariance, residual)
        return replace(base, correction=np.asarray(prior**2 * deviation * weights))

    def _alone(self, places: Integers) -> Floats:
        return np.asarray(self.adding[places].sum(axis=1))

    def _interaction(self, places: Integers) -> Floats:
        total = np.zeros(len(places))
        for g in range(len(self.sizes) - 1):
            total += self.pairs[places[:, g, None], places[:, g + 1 :]].sum(axis=1)
        return total


def _flat(scores: Iterable[Iterable[float]]) -> Floats:
    return np.array([score for own in scores for score in own], dtype=np.float64)


def _joined(alone: Floats, interaction: Floats, strength: float) -> Floats:
    return np.maximum(alone + strength * interaction, LEAST_OF_SUM * alone)


def _log_error(predicted: Floats, measured: Floats) -> float:
    known = (predicted > 0.0) & (measured > 0.0)
    return float(np.sum(np.log(predicted[known] / measured[known]) ** 2))


def _negative_evidence(covariance: Floats, residual: Floats) -> float:
    _, logdet = np.linalg.slogdet(covariance)
    return float(residual @ np.linalg.solve(covariance, residual) + logdet)
