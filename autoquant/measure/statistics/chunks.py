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
from autoquant.formats.moments import FEWEST_TOKENS
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

    def sizes(self, rows: int, tokens: Tensor | None) -> list[int]:
        """How many of the rows that a matrix multiplies belong to each sequence, which they follow.

        Args:
            rows: all of them.
            tokens: as `taps.See` takes them.

        Raises:
            ValueError: rows that are no tokens.
        """
        count, length = self.tokens.shape
        if count == 1:
            return [rows]
        if tokens is not None:
            return torch.bincount(tokens // length, minlength=count).tolist()
        if rows % count:
            raise ValueError(f"{rows} rows are multiplied of {count} sequences")
        return [rows // count] * count

    def parted(self, rows: Tensor, sizes: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Rows [R, K] of sequences that codes are fitted to, with 0, and of those held out, with 1.

        A GPU waits for each step: so those of a part come together.
        """
        own = rows.split(list(sizes))
        for part in (0, 1):
            found = [each for n, each in enumerate(own, self.first) if is_held_out(n) == part]
            if found:
                yield part, found[0] if len(found) == 1 else torch.cat(found)


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


def why_unfitted(split: Split) -> str | None:
    """Why codes cannot be fitted to any input of the calibration tokens; None if they can."""
    if not any(map(is_held_out, range(split.sequences))):
        return "calibration has one sequence, and another has to be held out"
    if split.tokens < FEWEST_TOKENS:
        return f"calibration has {split.tokens} tokens, fewer than {FEWEST_TOKENS}"
    return None


def is_held_out(sequence: int) -> bool:
    """Whether a sequence of the split, counted from 0, is held out."""
    return sequence % HELD_OUT_OF == 1
