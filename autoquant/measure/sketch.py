"""Sketches of how a probe changes the output distribution, for the interaction of every pair.

To second order the KL of a candidate that changes the logits by dz is half the squared length of
u = sqrt(p) * (dz - E_p dz), p the BF16 distribution; where several groups change the output
together, their u add, so <u_i, u_j> is what the pair costs beyond its two parts. u has one number
per token and vocabulary entry; a random projection to a few numbers per token keeps the inner
products (Johnson and Lindenstrauss, 1984; signs after Achlioptas, 2003).

Shapes: T tokens, V vocabulary, W width of the sketch.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

WIDTH = 32
EVERY = 8
MOST_BYTES = 2**28
"""Most memory that the sketches of all probes of one batch may take."""


@dataclass(frozen=True, slots=True)
class LogitSketch:
    """Projects the whitened logit change of every n-th token of a batch.

    The same projection serves all probes of a search, so that their sketches can be multiplied.
    """

    width: int = WIDTH
    """Numbers kept per token."""
    every: int = EVERY
    """One token of this many is sketched."""

    @classmethod
    def within_memory(cls, *, probes: int, tokens: int) -> "LogitSketch":
        """One that takes as many of a batch's tokens as `MOST_BYTES` for all probes allow."""
        bytes_per_token = 4 * probes * WIDTH
        return cls(every=max(EVERY, -(-bytes_per_token * tokens // MOST_BYTES)))

    def of(self, reference: torch.Tensor, logits: torch.Tensor, *, first: int) -> torch.Tensor:
        """The sketch of one tile of a batch, float32, flat.

        Args:
            reference: BF16 model's logits, float32 [T, V].
            logits: candidate's logits, float32 [T, V].
            first: index of the tile's first token in the batch.
        """
        rows = slice(-first % self.every, None, self.every)
        before, change = reference[rows], logits[rows] - reference[rows]
        p = before.softmax(dim=-1)
        change -= (p * change).sum(dim=-1, keepdim=True)
        signs = _signs(logits.shape[-1], self.width, logits.device)
        return (p.sqrt_().mul_(change) @ signs).flatten()


@lru_cache(maxsize=1)
def _signs(vocabulary: int, width: int, device: torch.device) -> torch.Tensor:
    """Random signs, float32 [V, W], scaled so that inner products keep their mean."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (vocabulary, width), generator=generator)
    scaled: torch.Tensor = (2.0 * signs - 1.0) / width**0.5
    return scaled.to(device)
