"""How sure a mean over tokens is, when tokens of one document resemble each other.

What is independent is a unit: a document, or a passage where documents are few. A mean over tokens
is the ratio of two sums over units, of a quantity and of tokens, and both belong to the sample.

Shapes: G units, R resamples.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from autoquant.arrays import Floats, Integers

NORMAL_95 = 1.959964
"""Standard errors on each side of a 95 % interval: the normal distribution's quantile at 97.5 %."""

RESAMPLES = 10_000

_BLOCK = 1 << 20
"""Numbers (resamples times units) that are drawn and reduced together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTotals:
    """A quantity summed over the tokens of each independent unit."""

    sums: Floats
    """[G]"""
    tokens: Floats
    """[G]"""

    @classmethod
    def of(cls, values: Floats, unit: Integers, tokens: Floats | None = None) -> "UnitTotals":
        """Totals of `values` [N], each summed over `tokens` [N] (one by default) of `unit` [N]."""
        numbers = np.unique(unit, return_inverse=True)[1]
        return cls(
            sums=np.bincount(numbers, values).astype(np.float64),
            tokens=np.bincount(numbers, tokens).astype(np.float64),
        )

    @property
    def mean(self) -> float:
        """Per token."""
        return float(self.sums.sum() / self.tokens.sum())

    def standard_error(self) -> float:
        """Of the mean, by leaving out each unit in turn; NaN of a single unit or an infinite mean.

        The delete-one jackknife of a ratio in closed form, known as CR3 of cluster-robust errors:
        it is not too small where units are few or differ in size (MacKinnon, Nielsen and Webb,
        Cluster-robust inference: A guide to empirical practice, Journal of Econometrics 232, 2023).
        """
        if len(self.sums) < 2 or not math.isfinite(self.mean):
            return math.nan
        ones = np.ones((1, len(self.sums)))
        return float(_standard_errors(self, ones, np.array([self.mean]))[0])

    def interval(
        self, tail: float, *, seed: int, resamples: int = RESAMPLES
    ) -> tuple[float, float]:
        """Bounds of the mean that its true value lies below, and above, with probability `tail`.

        The bootstrap-t: units are drawn with replacement, and each resample's distance from the
        mean is counted in its own standard errors (Efron and Tibshirani, An Introduction to the
        Bootstrap, 1993, section 12.5). Percentiles of the resampled means themselves make
        intervals of few units too narrow.
        """
        error = self.standard_error()
        if error == 0.0 or not math.isfinite(self.mean):
            return self.mean, self.mean
        distances = []
        for counts in _resamples(len(self.sums), resamples, seed):
            means = (counts @ self.sums) / (counts @ self.tokens)
            with np.errstate(divide="ignore", invalid="ignore"):
                distances.append((means - self.mean) / _standard_errors(self, counts, means))
        distance = np.concatenate(distances)
        # A resample of one unit alone has no standard error.
        low, high = np.quantile(distance[np.isfinite(distance)], [tail, 1.0 - tail])
        return self.mean - float(high) * error, self.mean - float(low) * error


def _standard_errors(totals: UnitTotals, counts: Floats, means: Floats) -> Floats:
    """Of the means [R] of resamples that hold each unit `counts` [R, G] times."""
    tokens = (counts @ totals.tokens)[:, None]
    residuals = totals.sums - means[:, None] * totals.tokens
    left = np.maximum(tokens - totals.tokens, 0.0)
    moves = np.divide(residuals, left, out=np.zeros_like(residuals), where=left > 0.0)
    units = len(totals.sums)
    errors: Floats = np.sqrt((units - 1) / units * np.sum(counts * moves**2, axis=1))
    return errors


def _resamples(units: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each unit is drawn, [R, G], a block of resamples at a time."""
    generator = np.random.default_rng(seed)
    size = max(1, _BLOCK // units)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        picks = generator.integers(units, size=(rows, units)) + units * np.arange(rows)[:, None]
        counts = np.bincount(picks.ravel(), minlength=rows * units)
        yield counts.reshape(rows, units).astype(np.float64)
