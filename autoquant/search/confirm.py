"""The last word: finalists on tokens that nothing before has seen, compared in pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoquant.arrays import Floats
from autoquant.measure.kl import TokenKl

RESAMPLES = 10_000
CONFIDENCE = 0.95
FEWEST_SEQUENCES = 8
"""A bootstrap over fewer has hardly any spread, so that luck would pass for a gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Mean KL of one candidate minus another's on the same tokens, nats per token."""

    mean: float
    low: float
    high: float
    """Paired bootstrap interval over sequences; NaN where they are too few for one."""

    @property
    def is_gain(self) -> bool:
        """Whether the first candidate is better beyond the interval."""
        return self.high < 0.0


def paired_difference(
    one: TokenKl, other: TokenKl, *, seed: int, comparisons: int = 1
) -> Difference:
    """Bootstrap the difference of two means over sequences, which both have scored.

    Args:
        one: scores whose gain is in question.
        other: scores of the same tokens.
        seed: of the resampling.
        comparisons: how many such questions are asked; the interval widens accordingly
            (Bonferroni).
    """
    sums = np.asarray(np.bincount(one.sequence, one.kl - other.kl), dtype=np.float64)
    sizes = one.tokens_by_sequence()
    mean = float(sums.sum() / sizes.sum())
    if len(sums) < FEWEST_SEQUENCES:
        return Difference(mean=mean, low=math.nan, high=math.nan)
    means = _resampled_means(sums, sizes, seed)
    tail = (1.0 - CONFIDENCE) / comparisons / 2
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Difference(mean=mean, low=float(low), high=float(high))


def choose(
    scores: Sequence[TokenKl], *, challengers: int, seed: int
) -> tuple[int, list[Difference]]:
    """Pick among finalists; the first is the incumbent (the solver's optimum).

    A challenger takes its place only where its paired gain lies beyond the interval. Challengers
    are asked in their order until one fails, which needs no wider intervals (the fixed-sequence
    procedure; Maurer, Hothorn and Lehmacher, 1995). The others are asked all, with intervals
    widened accordingly (Bonferroni).

    Args:
        scores: the incumbent's, the challengers' most promising first, the others'.
        challengers: how many of them are challengers.
        seed: of the resampling.

    Returns:
        The index of the winner, and each finalist's difference to the first.
    """
    winner = 0
    for index in range(1, 1 + challengers):
        if not paired_difference(scores[index], scores[winner], seed=seed).is_gain:
            break
        winner = index
    others = range(1 + challengers, len(scores))
    for index in others:
        gain = paired_difference(scores[index], scores[winner], seed=seed, comparisons=len(others))
        if gain.is_gain:
            winner = index
    return winner, [paired_difference(score, scores[0], seed=seed) for score in scores]


def _resampled_means(sums: Floats, sizes: Floats, seed: int) -> Floats:
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 500):
        picks = generator.integers(len(sums), size=(min(500, RESAMPLES - start), len(sums)))
        means[start : start + len(picks)] = sums[picks].sum(axis=1) / sizes[picks].sum(axis=1)
    return means
