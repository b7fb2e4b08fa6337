"""The race of a candidate against a rival: who is clearly worse is not measured to the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from autoquant.arrays import Floats, Integers
from autoquant.measure.kl import TokenKl
from autoquant.measure.uncertainty import UnitTotals

RACE_DEVIATIONS = 3.0
"""Standard errors of the paired difference beyond which a candidate is given up. One look takes an
equal for worse once in 740 with a normal error, and once in 100 with the fewest units, whose spread
is uncertain (Student's t with seven degrees of freedom)."""
RACE_UNITS = 8
"""Fewest documents, or passages, on which one is given up: of four it would be once in 35."""


@dataclass(frozen=True, slots=True)
class Gap:
    """How much worse a candidate is than its rival on the same tokens, nats per token."""

    mean: float
    stderr: float

    def to_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "stderr": self.stderr}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(data["mean"], data["stderr"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """When a candidate is given up against a rival, the units of a split taken in pairs."""

    rival: tuple[float, ...]
    """Mean KL of each sequence of the split under the rival, nats per token."""
    deviations: float = RACE_DEVIATIONS
    fewest: int = RACE_UNITS

    def lost(self, scores: TokenKl) -> Gap | None:
        """The gap to the rival on the split's first sequences, if it is wider than its error allows
        for equals.

        A candidate whose KL is not finite has no gap and is measured on: it cannot win either way.

        Args:
            scores: the candidate's, of the first sequences of the split.
        """
        sizes, means = scores.tokens_by_sequence(), scores.by_sequence()
        if len(np.unique(scores.unit)) < self.fewest or not np.isfinite(means).all():
            return None
        gap = gap_of(
            means, np.array(self.rival[: len(means)]), scores.unit, sizes.astype(np.float64)
        )
        return gap if self.is_lost_by(gap) else None

    def is_lost_by(self, gap: Gap) -> bool:
        """Whether a gap is wider than its error allows for equals."""
        return gap.mean > self.deviations * gap.stderr

    def to_dict(self) -> dict[str, Any]:
        return {
            "rival": list(self.rival),
            "deviations": self.deviations,
            "fewest": self.fewest,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(rival=tuple(data["rival"]), deviations=data["deviations"], fewest=data["fewest"])


def gap_of(own: Floats, rival: Floats, unit: Integers, tokens: Floats) -> Gap:
    """How much worse the first is, nats per token.

    Args:
        own: mean KL of each sequence, nats per token, [S].
        rival: the rival's on the same sequences, [S].
        unit: number of each sequence's document or passage, [S].
        tokens: of each sequence, [S].
    """
    totals = UnitTotals.of(tokens * (own - rival), unit, tokens)
    return Gap(totals.mean, totals.standard_error())
