"""Per-token KL(BF16 || quantized) and the statistics that readers of KL reports expect.

Shapes: T tokens, S sequences, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch

from autoquant.arrays import Booleans, Floats, Integers
from autoquant.measure.uncertainty import UnitTotals


@dataclass(frozen=True, kw_only=True)
class TokenKl:
    """KL of every token of a split or a batch, in order."""

    kl: Floats
    """KL(BF16 || quantized), nats, [T]."""
    sequence: Integers
    """Index of the sequence that each token belongs to, [T]."""
    unit: Integers
    """Number of the document, or passage, that each sequence is from, [S]: the independent units of
    every standard error and interval (`Split.units`)."""

    @classmethod
    def joined(cls, batches: Iterable[Self]) -> Self:
        """Consecutive batches as one, sequences renumbered."""
        parts = list(batches)
        offsets = np.cumsum([0] + [int(part.sequence[-1]) + 1 for part in parts[:-1]])
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name, own in parts[0].__dict__.items()
            if name != "sequence" and isinstance(own, np.ndarray)
        }
        sequence = [part.sequence + offset for part, offset in zip(parts, offsets, strict=True)]
        return cls(**columns, sequence=np.concatenate(sequence))

    def by_sequence(self) -> Floats:
        """Mean KL of each sequence, nats per token, [S]."""
        return np.asarray(np.bincount(self.sequence, self.kl) / self.tokens_by_sequence())

    def position(self) -> Integers:
        """Tokens before each token in its sequence, [T]."""
        counts = np.bincount(self.sequence)
        starts = np.cumsum(counts) - counts
        found: Integers = np.arange(len(self.sequence)) - starts[self.sequence]
        return found

    def tokens_by_sequence(self) -> Floats:
        return np.bincount(self.sequence).astype(np.float64)

    @property
    def mean(self) -> float:
        """Mean KL, nats per token."""
        return float(self.kl.mean())

    def by_unit(self, *, minus: "TokenKl | None" = None) -> UnitTotals:
        """KL summed over the tokens of each unit, nats.

        Args:
            minus: another candidate on the same tokens, whose KL is taken off token by token.
        """
        kl = self.kl if minus is None else self.kl - minus.kl
        return UnitTotals.of(kl, self.unit[self.sequence])

    def stderr(self) -> float:
        """Standard error of the mean, nats per token; NaN of a single unit."""
        return self.by_unit().standard_error()

    def summary(self) -> dict[str, float]:
        """mean, stderr, median, p99, p999 and max of the KL in nats per token."""
        median, p99, p999 = np.quantile(self.kl, [0.5, 0.99, 0.999])
        return {
            "mean": self.mean,
            "stderr": self.stderr(),
            "median": float(median),
            "p99": float(p99),
            "p999": float(p999),
            "max": float(self.kl.max()),
        }


@dataclass(frozen=True, kw_only=True)
class TokenScores(TokenKl):
    """KL with what else is reported of a finalist."""

    agrees: Booleans
    """Whether the most likely token is the same, [T]."""
    nll_reference: Floats
    """Negative log-likelihood of the actual next token under BF16, nats; NaN at sequence ends."""
    nll: Floats
    """The same under the candidate."""
    clipped: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Input elements of each set that were beyond what its scale holds, and all that were
    quantized, where that was counted."""

    @classmethod
    def joined(cls, batches: Iterable[Self]) -> Self:
        """Consecutive batches as one; what is clipped of their inputs is summed."""
        parts, clipped = list(batches), dict[str, tuple[int, int]]()
        for part in parts:
            for name, (beyond, elements) in part.clipped.items():
                before = clipped.get(name, (0, 0))
                clipped[name] = before[0] + beyond, before[1] + elements
        return replace(super().joined(parts), clipped=clipped)

    def top1_agreement(self) -> float:
        return float(self.agrees.mean())

    def perplexity(self) -> dict[str, float]:
        """Perplexity of the text under both models."""
        return {
            "bf16": float(np.exp(np.nanmean(self.nll_reference))),
            "quantized": float(np.exp(np.nanmean(self.nll))),
        }


def likelihoods(
    reference: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The columns of `TokenScores` beyond the KL.

    Args:
        reference: BF16 model's logits, float32 [T, V].
        logits: candidate's logits, float32 [T, V].
        labels: next token of each position, int64 [T], -1 where there is none.
    """
    return {
        "agrees": reference.argmax(dim=-1) == logits.argmax(dim=-1),
        "nll_reference": _nll(reference, labels),
        "nll": _nll(logits, labels),
    }


def _nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    chosen = logits.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    nll = torch.logsumexp(logits, dim=-1) - chosen
    return nll.double().masked_fill(labels < 0, float("nan"))
