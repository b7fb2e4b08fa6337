"""Calibration sequences that go through a block together, and whose rows are whose.

Chunks do not follow the batches, so that nothing that is summed depends on these.

Shapes: B sequences, L tokens of each, R rows that a weight multiplies, K their width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from autoquant.data.tokens import Split
from autoquant.forward.flow import Flow, entered
from autoquant.measure.scorer import Scorer
from autoquant.model.binding import DenseSlot
from autoquant.source.names import ROUTED_EXPERT

CHUNK_TOKENS = 4096
"""Of a chunk on a GPU, which waits for each of its steps."""

HELD_OUT_OF = 4
"""One sequence of so many is held out."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Sequences that follow each other in a split."""

    tokens: Tensor
    """int64 [B, L], on the device."""
    first: int
    """Number of its first sequence."""

    def flow(self, scorer: Scorer, *, keep: bool = False) -> Flow:
        """A forward of the BF16 model, which takes all sequences through a stage at once."""
        return Flow(parts=entered(scorer.trunk, scorer.room, [self.tokens]), keep=keep)

    def apart(self, rows: Tensor, tokens: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """The number of each sequence, and its rows.

        Args:
            rows: [R, K] of all of them.
            tokens: as `taps.See` takes them.

        Raises:
            ValueError: rows that are no tokens.
        """
        count, length = self.tokens.shape
        if count == 1:
            yield self.first, rows
            return
        if tokens is not None:
            sizes = torch.bincount(tokens // length, minlength=count).tolist()
        elif len(rows) % count:
            raise ValueError(f"{len(rows)} rows are multiplied of {count} sequences")
        else:
            sizes = [len(rows) // count] * count
        yield from enumerate(rows.split(sizes), start=self.first)


def chunks_of(scorer: Scorer, split: Split) -> list[Chunk]:
    """The sequences of a split: one by one on a CPU, and where an expert that is a module of its
    own does not say which tokens it is shown.
    """
    slots = [slot for _, slot in scorer.quantized.slots]
    is_apart = any(isinstance(s, DenseSlot) and ROUTED_EXPERT.fullmatch(s.name) for s in slots)
    found: list[list[Tensor]] = []
    for batch in split.batches:
        most = 1 if is_apart or scorer.device.type == "cpu" else _most(scorer, batch.shape[1])
        for tokens in batch.to(scorer.device).split(1):
            if not found or len(found[-1]) == most or found[-1][0].shape != tokens.shape:
                found.append([])
            found[-1].append(tokens)
    firsts = accumulate(map(len, found), initial=0)
    return [Chunk(torch.cat(own), first) for own, first in zip(found, firsts, strict=False)]


def _most(scorer: Scorer, length: int) -> int:
    """Sequences of a chunk, whose graphs fit."""
    fitting = scorer.room.graphs_at_once
    return max(1, min(CHUNK_TOKENS // length, fitting or CHUNK_TOKENS))


def states_bytes(scorer: Scorer, chunks: Sequence[Chunk]) -> int:
    """Of the states of chunks between two blocks."""
    return scorer.trunk.state_bytes(sum(own.tokens.numel() for own in chunks))


def is_held_out(sequence: int) -> bool:
    """Whether a sequence of the split, counted from 0, is held out."""
    return sequence % HELD_OUT_OF == 1
