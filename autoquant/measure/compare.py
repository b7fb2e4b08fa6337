"""The outputs of a candidate and of the BF16 model, token by token.

Shapes: B sequences, L tokens of each, T tokens of a tile, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import autoquant_kernels as kernels
import numpy as np
import torch

from autoquant.arrays import Integers
from autoquant.data.tokens import Split
from autoquant.forward.flow import Flow
from autoquant.forward.head import Head
from autoquant.measure.interactions import Key
from autoquant.measure.kl import TokenKl, TokenScores, likelihoods
from autoquant.measure.sketch import LogitSketch


@dataclass(slots=True)
class Batch:
    """One batch of a split, with what is kept of it between candidates."""

    tokens: torch.Tensor
    """int64 [B, L], on the device."""
    units: Integers
    """Number of each sequence's independent unit, [B]."""
    reference: torch.Tensor | None = None
    """Final hidden states of the BF16 model, [B, L, H], once they are known."""
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    """Reference logit tiles by first token, as far as memory allows."""
    noise: TokenKl | None = None
    """KL between two BF16 runs, once it is known."""
    previous: Flow | None = None
    """The last candidate that was measured alone, with its states."""

    @property
    def sequence(self) -> Integers:
        """Index of the sequence of each token, [B * L]."""
        rows, length = self.tokens.shape
        return np.repeat(np.arange(rows), length)

    @property
    def bytes(self) -> int:
        """Memory of what is kept for speed alone."""
        previous = self.previous.bytes if self.previous is not None else 0
        return previous + sum(map(bytes_of, self.logits.values()))

    def drop_logits(self) -> int:
        """Give back the reference logits; their bytes.

        Kept, they would lie between the buffers that are freed, and memory would grow by a
        multiple of them.
        """
        size = sum(map(bytes_of, self.logits.values()))
        self.logits.clear()
        return size


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """Batches on which the BF16 model runs in a pass for something else, for gradients to come."""

    split: Split
    batches: tuple[int, ...]
    with_noise: bool
    """Whether what `Scorer.noise` says is measured too."""


@dataclass(slots=True)
class Cache:
    """Memory for what is kept between candidates."""

    left: int
    """Bytes."""

    def take(self, size: int) -> bool:
        """Whether there was room for `size` bytes, which then are taken."""
        if size > self.left:
            return False
        self.left -= size
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What one group in one choice does to a batch, the rest in BF16."""

    batch: int
    key: Key
    kl: TokenKl
    sketch: torch.Tensor
    """The logit change as a sketch keeps it, float32 on the host; empty without one."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Compares final hidden states with the BF16 model's, under the choices in force."""

    head: Head
    cache: Cache

    def kl(self, batch: Batch, hidden: torch.Tensor) -> TokenKl:
        """KL of every token, of hidden states [B, L, H]."""
        return self.kl_and_sketch(batch, hidden, None)[0]

    @torch.inference_mode()
    def kl_and_sketch(
        self, batch: Batch, hidden: torch.Tensor, sketch: LogitSketch | None
    ) -> tuple[TokenKl, torch.Tensor]:
        """The same, and the logit change as `sketch` keeps it, float32; empty without one."""
        tiles, sketches = [], [hidden.new_empty(0, dtype=torch.float32)]
        for span, reference, logits in self._tiles(batch, hidden):
            tiles.append(kernels.token_kl(reference, logits))
            if sketch is not None:
                sketches.append(sketch.of(reference, logits, first=span.start))
        kl = torch.cat(tiles).double().cpu().numpy()
        return TokenKl(kl=kl, sequence=batch.sequence, unit=batch.units), torch.cat(sketches)

    @torch.inference_mode()
    def fully(self, batch: Batch, hidden: torch.Tensor) -> TokenScores:
        """KL, agreement and likelihoods of every token."""
        labels = torch.full_like(batch.tokens, -1)
        labels[:, :-1] = batch.tokens[:, 1:]
        columns: dict[str, list[torch.Tensor]] = {}
        for span, reference, logits in self._tiles(batch, hidden):
            tile = {"kl": kernels.token_kl(reference, logits).double()}
            tile |= likelihoods(reference, logits, labels.flatten()[span])
            for name, values in tile.items():
                columns.setdefault(name, []).append(values)
        joined = {name: torch.cat(values).cpu().numpy() for name, values in columns.items()}
        return TokenScores(
            sequence=batch.sequence,
            unit=batch.units,
            kl=joined["kl"],
            agrees=joined["agrees"],
            nll_reference=joined["nll_reference"],
            nll=joined["nll"],
        )

    def _tiles(
        self, batch: Batch, hidden: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield tokens, reference logits and candidate's logits, float32 [T, V], tile by tile."""
        assert batch.reference is not None, "the BF16 model has not been run on this batch"
        ours, theirs = hidden.flatten(0, 1), batch.reference.flatten(0, 1)
        buffers = self.head.buffers(hidden, 2)
        for span in self.head.spans(hidden):
            tile, other = buffers[:, : span.stop - span.start]
            reference = batch.logits.get(span.start)
            if reference is None:
                known = theirs[span].to(ours.device, non_blocking=True)
                keep = self.cache.take(bytes_of(other))
                reference = self.head.logits(known, None if keep else other)
                if keep:
                    batch.logits[span.start] = reference
            yield span, reference, self.head.candidate_logits(ours[span], tile)


def bytes_of(tensor: torch.Tensor) -> int:
    """Memory of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
