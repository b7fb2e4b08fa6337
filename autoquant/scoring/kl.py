"""Per-token KL(BF16 || quantized) and the statistics that readers of KL reports expect.

Shapes: T tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What one candidate did to every token of a split, in the split's order."""

    kl: Array
    """KL(BF16 || quantized), nats, [T]."""
    agrees: np.ndarray[Any, np.dtype[np.bool_]]
    """Whether the most likely token is the same, [T]."""
    nll_reference: Array
    """Negative log-likelihood of the actual next token under BF16, nats; NaN at sequence ends."""
    nll: Array
    """The same under the candidate."""
    sequence: np.ndarray[Any, np.dtype[np.int64]]
    """Index of the sequence that each token belongs to, [T]."""

    def by_sequence(self) -> Array:
        """Mean KL of each sequence, nats per token: the independent unit of every interval."""
        return np.bincount(self.sequence, self.kl) / np.bincount(self.sequence)

    def tokens_by_sequence(self) -> Array:
        return np.bincount(self.sequence).astype(np.float64)

    @property
    def mean(self) -> float:
        """Mean KL, nats per token."""
        return float(self.kl.mean())

    def stderr(self) -> float:
        """Standard error of the mean, sequences taken as the independent units."""
        sizes, means = self.tokens_by_sequence(), self.by_sequence()
        if len(sizes) < 2:
            return float("nan")
        shares = sizes / sizes.sum()
        variance = float(np.sum(shares**2 * (means - self.mean) ** 2))
        return float(np.sqrt(variance * len(sizes) / (len(sizes) - 1)))

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

    def top1_agreement(self) -> float:
        return float(self.agrees.mean())

    def perplexity(self) -> dict[str, float]:
        """Perplexity of the text under both models."""
        return {
            "bf16": float(np.exp(np.nanmean(self.nll_reference))),
            "quantized": float(np.exp(np.nanmean(self.nll))),
        }


def compare_tile(
    reference: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Scores of one tile of tokens.

    Args:
        reference: BF16 model's logits, float32 [T, V].
        logits: candidate's logits, float32 [T, V].
        labels: next token of each position, int64 [T], -1 where there is none.
    """
    log_p = torch.log_softmax(reference, dim=-1)
    log_q = torch.log_softmax(logits, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1, dtype=torch.float64)
    index = labels.clamp_min(0)[:, None]
    missing = labels < 0
    return {
        # Rounding can leave a sum of -1e-9 where the distributions are equal.
        "kl": divergence.clamp_min(0.0),
        "agrees": reference.argmax(dim=-1) == logits.argmax(dim=-1),
        "nll_reference": _nll(log_p, index, missing),
        "nll": _nll(log_q, index, missing),
    }


def _nll(log_p: torch.Tensor, index: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    return -log_p.gather(1, index)[:, 0].double().masked_fill(missing, float("nan"))
