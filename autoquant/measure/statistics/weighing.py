"""How much rows count in second moments: by the gradient of what the model says at their products.

To second order an error D of a weight costs KL = 1/2 E[(g^T D x)^2] for an input x, with g the
gradient at the product of <v, logits> and v random, of the covariance that `gradient.py` names. So
rows at which g is large deserve more. A row has the weight |g|, g over all weights that read it:
|g|^2 was no better where both were measured, and lets fewer rows speak. On tokens that a model
parks its attention on, inputs are huge and gradients tiny; without weights, sums are about them.

Shapes: B sequences, L tokens of each, R rows, N outputs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from autoquant.codes.row_weights import RowWeights
from autoquant.forward.backward import Backward, pieces_of
from autoquant.forward.flow import Flow, entered, loop, walk
from autoquant.measure.gradient import backward_passes, random_pull
from autoquant.measure.scorer import Scorer
from autoquant.measure.statistics.output_taps import OutputTaps
from autoquant.model.binding import DenseSlot
from autoquant.plan.linears import LayerGroup
from autoquant.source.names import ROUTED_EXPERT

CHUNK_TOKENS = 4096
"""Of the sequences that go through a GPU's blocks together. It does not follow the batches, so that
weights do not depend on these."""

SEED = 0
"""Of the random vectors."""


def weigh_rows(
    scorer: Scorer,
    sequences: Sequence[Tensor],
    groups: Mapping[int | None, Sequence[LayerGroup]],
    advance: Callable[[], None],
) -> dict[str, RowWeights]:
    """Weights of the rows of each input set; sets that no gradient reaches are left out.

    Args:
        scorer: all groups in BF16.
        sequences: int64 [1, L] each, on the device.
        groups: of every layer, whose inputs are weighed.
        advance: called once for each sequence, as far as it is done.

    Raises:
        NoGradient: an architecture or a kernel without a backward pass.
    """
    chunks = [*_chunks(scorer, sequences)]
    largest = max(chunk.numel() for chunk in chunks)
    weight = scorer.trunk.head.weight
    states = scorer.trunk.stages * largest * weight.shape[1] * weight.element_size()
    seen: _Squares = defaultdict(lambda: [{} for _ in sequences])
    first = 0
    for wave in scorer.room.waves(range(len(chunks)), states):
        with backward_passes():
            weigher = _Weigher(scorer, [chunks[i] for i in wave], groups, first, seen, advance)
            loop(scorer.trunk, [weigher], backwards=True)
        first += weigher.sequences
    found = {name: RowWeights.of_squares(squares) for name, squares in seen.items()}
    return {name: own for name, own in found.items() if own is not None}


def _chunks(scorer: Scorer, sequences: Sequence[Tensor]) -> Iterator[Tensor]:
    """Sequences [B, L] that go through a block together: one by one on a CPU, and where an expert
    that is a module of its own does not say which tokens it is shown.
    """
    slots = [slot for _, slot in scorer.quantized.slots]
    is_apart = any(isinstance(s, DenseSlot) and ROUTED_EXPERT.fullmatch(s.name) for s in slots)
    most = 1 if is_apart or scorer.device.type == "cpu" else CHUNK_TOKENS
    own: list[Tensor] = []
    for sequence in sequences:
        if own and (sequence.shape != own[0].shape or (len(own) + 1) * sequence.numel() > most):
            yield torch.cat(own)
            own = []
        own.append(sequence)
    yield torch.cat(own)


_Squares = defaultdict[str, list[dict[int, Tensor]]]
"""Squared norms of gradients by input set, sequence and matrix, float32 on the host."""


class _Weigher:
    """The visitor that takes gradients back through each stage, and keeps their sizes.

    Args:
        scorer: all groups in BF16.
        chunks: int64 [B, L] each.
        groups: of every layer.
        first: number of the first sequence.
        seen: where sizes are added.
        advance: called once for each sequence, as far as it is done.
    """

    def __init__(
        self,
        scorer: Scorer,
        chunks: Sequence[Tensor],
        groups: Mapping[int | None, Sequence[LayerGroup]],
        first: int,
        seen: _Squares,
        advance: Callable[[], None],
    ) -> None:
        self._scorer, self._groups, self._seen = scorer, groups, seen
        self._advance, self._told = advance, 0
        self.sequences = sum(len(chunk) for chunk in chunks)
        self._numbers, self._length = range(0), 0
        """Of the sequences that are in the stage, and their tokens."""
        self._backs = [*self._backwards(chunks, first)]

    def visit(self, stage: int) -> None:
        """Compute the stage again for every chunk, and its gradients."""
        stage_of = self._scorer.trunk.stage_of
        groups = [
            group
            for layer, own in self._groups.items()
            if layer is not None and stage_of(layer) == stage
            for group in own
        ]
        with OutputTaps(self._scorer.quantized, groups, self._see).installed():
            for back in self._backs:
                back.visit(stage)
        done = self.sequences * (self._scorer.trunk.stages - stage) // self._scorer.trunk.stages
        for _ in range(done - self._told):
            self._advance()
        self._told = done

    def _backwards(self, chunks: Sequence[Tensor], first: int) -> Iterator[Backward]:
        trunk, room = self._scorer.trunk, self._scorer.room
        flows = [Flow(parts=entered(trunk, room, room.parts(own)), keep=True) for own in chunks]
        walk(trunk, self._scorer.quantized, room, flows)
        for chunk, flow in zip(chunks, flows, strict=True):
            pull = random_pull(self._scorer, SEED, first)
            pieces = pieces_of(trunk, room, flow)
            sizes = [len(piece.tokens) for own in pieces for piece in own]
            ends = accumulate(sizes, initial=first)
            numbers = [range(start, end) for start, end in pairwise(ends)]
            tapped = [partial(self._running, own, chunk.shape[1]) for own in numbers]
            yield Backward(trunk, room, flow, pieces, tapped, pull)
            first += len(chunk)

    @contextmanager
    def _running(self, numbers: range, length: int) -> Iterator[None]:
        self._numbers, self._length = numbers, length
        yield

    def _see(self, name: str, matrix: int, gradient: Tensor, tokens: Tensor | None) -> None:
        """Add the sizes of gradients [R, N] at the products of one matrix."""
        squares, count = gradient.float().square().sum(dim=1), len(self._numbers)
        if tokens is not None:
            sizes = torch.bincount(tokens // self._length, minlength=count).tolist()
        elif len(squares) % count:  # rows that are no tokens
            return
        else:
            sizes = [len(squares) // count] * count
        for number, own in zip(self._numbers, squares.cpu().split(sizes), strict=True):
            found = self._seen[name][number]
            if matrix not in found:
                found[matrix] = own
            elif len(found[matrix]) == len(own):
                found[matrix] = found[matrix] + own
