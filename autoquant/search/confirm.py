"""The last word: finalists on tokens that nothing before has seen, compared in pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoquant.data.tokens import FEWEST_UNITS
from autoquant.measure.kl import TokenKl
from autoquant.measure.uncertainty import RESAMPLES

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Mean KL of one candidate minus another's on the same tokens, nats per token."""

    mean: float
    low: float
    high: float
    """Paired bootstrap-t interval over documents (or passages); NaN where they are fewer than
    `FEWEST_UNITS`, whose spread says too little of luck."""

    @property
    def is_gain(self) -> bool:
        """Whether the first candidate is better beyond the interval."""
        return self.high < 0.0


def paired_difference(
    one: TokenKl, other: TokenKl, *, seed: int, comparisons: int = 1, resamples: int = RESAMPLES
) -> Difference:
    """The difference of two means over the same tokens, resampling documents (or passages).

    Args:
        one: scores whose gain is in question.
        other: scores of the same tokens.
        seed: of the resampling.
        comparisons: how many such questions are asked; the interval widens accordingly
            (Bonferroni).
        resamples: of the bootstrap.
    """
    totals = one.by_unit(minus=other)
    if len(totals.sums) < FEWEST_UNITS:
        return Difference(mean=totals.mean, low=math.nan, high=math.nan)
    tail = (1.0 - CONFIDENCE) / comparisons / 2
    low, high = totals.interval(tail, seed=seed, resamples=resamples)
    return Difference(mean=totals.mean, low=low, high=high)


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
