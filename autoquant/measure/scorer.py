"""Scores assignments on a split: the pure calls `score` and `score_fully`.

The BF16 model's final hidden states are kept instead of its logits (H numbers a token where the
vocabulary needs V), and logits of both models are formed in float32 from the BF16 operands, a
tile of tokens at a time, so that the head's output rounding is not charged to any candidate.

A candidate runs from the first block in which it differs from the one before it. Reused states are
those that the forward would compute again, so the KL is the same to the bit.

Shapes: B sequences, L tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import autoquant_kernels as kernels
import numpy as np
import torch

from autoquant.arrays import Integers
from autoquant.data.tokens import Split
from autoquant.errors import SourceError
from autoquant.formats import Choice
from autoquant.measure.forward import Trace, Trunk
from autoquant.measure.kl import TokenKl, TokenScores, likelihoods
from autoquant.measure.sketch import LogitSketch
from autoquant.model.live import QuantizedModel
from autoquant.plan.assignment import Assignment

CPU_TILE_BYTES = 1 << 26
GPU_TILE_BYTES = 3 << 27
GPU_TILE_TOKENS = 128
"""Size of one float32 logit tile; a tile of each model is alive at a time. A GPU's matrix product
needs hundreds of tokens, a multiple of its own tile, to run at full speed; a CPU's fits the caches
better with less."""

_BF16 = Assignment.of({})


@dataclass(slots=True)
class _Batch:
    """One batch of a split, with what is kept of it between candidates."""

    tokens: torch.Tensor
    reference: torch.Tensor
    """Final hidden states of the BF16 model, [B, L, H]."""
    units: Integers
    """Number of each sequence's independent unit, [B]."""
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    """Reference logit tiles by first token, as far as memory allows."""
    previous: tuple[Assignment, Trace] | None = None


class Scorer:
    """Measures candidates of one model.

    Args:
        quantized: the live model.
        device: where tokens go.
        cache_bytes: memory for block states and reference logits between candidates.
    """

    def __init__(
        self, quantized: QuantizedModel, device: torch.device, *, cache_bytes: int = 2**28
    ) -> None:
        self.quantized = quantized
        self.device = device
        self.trunk = Trunk(quantized.model, quantized.products)
        self._batches: dict[tuple[str, int], _Batch] = {}
        self._block = {g.name: self.block_of(g.layer) for g in quantized.groups}
        self._cache_left = cache_bytes

    @property
    def blocks(self) -> int:
        return len(self.trunk.blocks)

    def block_of(self, layer: int | None) -> int:
        """First block to run when a group of this layer changes; behind all blocks for a head."""
        return layer if layer is not None else self.blocks

    def score(self, assignment: Assignment, split: Split) -> TokenKl:
        """KL of a whole assignment on every token of the split."""
        return TokenKl.joined(
            self.score_batch(assignment, split, index) for index in range(len(split.batches))
        )

    def score_batch(self, assignment: Assignment, split: Split, index: int) -> TokenKl:
        """KL of a whole assignment on one batch of the split."""
        batch = self._batch(split, index)
        with self._served(assignment):
            return self._compare(batch, self._trace(assignment, batch).hidden)

    def score_fully(self, assignment: Assignment, split: Split) -> TokenScores:
        """The same KL as `score`, with agreement and likelihoods."""
        return TokenScores.joined(
            self._score_batch_fully(assignment, split, index) for index in range(len(split.batches))
        )

    def probe_batch(
        self,
        split: Split,
        index: int,
        probes: Iterable[tuple[str, Choice]],
        sketch: LogitSketch | None = None,
    ) -> Iterator[tuple[TokenKl, torch.Tensor]]:
        """Measure groups on one batch, each alone in its choice, the rest in BF16.

        Yields:
            Each probe's KL, and its logit change as `sketch` keeps it, float32; empty without one.
        """
        batch = self._batch(split, index)
        trace = self.trunk.trace(batch.tokens)
        for group, choice in probes:
            with self._applied(Assignment.of({group: choice})):
                start = self._block[group]
                probed = self.trunk.trace(batch.tokens, start=start, after=trace, keep=False)
                result = self._compare_and_sketch(batch, probed.hidden, sketch)
            yield result

    def noise_batch(self, split: Split, index: int) -> TokenKl:
        """KL between two BF16 runs of one batch.

        The second computes attention with other kernels, or, where the architecture has only one,
        a sequence at a time.
        """
        batch = self._batch(split, index)
        with self.trunk.other_attention() as is_other:
            parts = (batch.tokens,) if is_other else batch.tokens.split(1)
            return self._compare(batch, torch.cat([self.trunk.hidden(part) for part in parts]))

    @torch.no_grad()
    def pull_back(
        self, hidden: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The gradient at final hidden states [B, L, H] of the sum of logits times `change`.

        Args:
            hidden: of the BF16 model.
            change: from a tile of float32 logits [T, V] to as many factors, taken as constants.
        """
        weight = self.trunk.head.weight
        weight = weight if hidden.is_cuda else self.quantized.products.copies.of(weight)
        flat = hidden.flatten(0, 1)
        tiles = flat.split(self._tile_rows(hidden))
        parts = [change(self._logits(tile, weight)).to(weight.dtype) @ weight for tile in tiles]
        return torch.cat(parts).to(hidden.dtype).view_as(hidden)

    def forget(self, split: Split) -> None:
        """Give back what is kept of a split."""
        for index in range(len(split.batches)):
            batch = self._batches.pop((split.digest, index), None)
            if batch is not None:
                self._cache_left += sum(map(_bytes, batch.logits.values()))
                self._cache_left += batch.previous[1].bytes if batch.previous else 0

    def check(self, split: Split) -> None:
        """Verify on one sequence that logits are the head applied to the final hidden states.

        Also finds out whether candidates may start between blocks.

        Raises:
            SourceError: they are not (a soft cap or a scale after the head).
        """
        tokens = split.batches[0][:1].to(self.device)
        with torch.inference_mode(), self._applied(_BF16), self.quantized.products.active():
            actual = self.quantized.model(input_ids=tokens, use_cache=False).logits
            expected = self.trunk.head(self.trunk.hidden(tokens))
        if not torch.equal(actual.float(), expected.float()):
            raise SourceError(
                f"{type(self.quantized.model).__name__} changes its logits after the head, which "
                "scoring from hidden states would miss.",
                fix="this architecture is not supported yet.",
            )
        with self._applied(_BF16):
            self.trunk.check_resuming(tokens)
            self.trunk.limit_memory(tokens)

    def _batch(self, split: Split, index: int) -> _Batch:
        key = (split.digest, index)
        if key not in self._batches:
            tokens = split.batches[index].to(self.device)
            with self._applied(_BF16):
                hidden = self.trunk.stored(self.trunk.hidden(tokens), len(split.batches))
            self._batches[key] = _Batch(tokens, hidden, split.units[index])
        return self._batches[key]

    def _applied(self, assignment: Assignment) -> "_Applied":
        """The assignment alone: of single groups, and of the BF16 model."""
        return _Applied(self.quantized, assignment, with_cache=False)

    def _served(self, assignment: Assignment) -> "_Applied":
        """The assignment as it is served, with the cache's format."""
        return _Applied(self.quantized, assignment, with_cache=True)

    def _trace(self, assignment: Assignment, batch: _Batch) -> Trace:
        """Run a candidate, from where it differs from the batch's previous one."""
        if batch.previous is None:
            size = (self.blocks + 1) * _bytes(batch.reference)
            keep = self.trunk.can_resume and size <= self._cache_left
            trace = self.trunk.trace(batch.tokens, keep=keep)
            if not keep:
                return trace
            self._cache_left -= trace.bytes
        else:
            before, states = batch.previous
            differing = [b for g, b in self._block.items() if before[g] != assignment[g]]
            start = min(differing, default=self.blocks)
            trace = self.trunk.trace(batch.tokens, start=start, after=states)
        batch.previous = (assignment, trace)
        return trace

    def _score_batch_fully(self, assignment: Assignment, split: Split, index: int) -> TokenScores:
        batch = self._batch(split, index)
        labels = torch.full_like(batch.tokens, -1)
        labels[:, :-1] = batch.tokens[:, 1:]
        columns: dict[str, list[torch.Tensor]] = {}
        with torch.inference_mode(), self._served(assignment):
            hidden = self._trace(assignment, batch).hidden
            for span, reference, logits in self._tiles(batch, hidden):
                tile = {"kl": kernels.token_kl(reference, logits).double()}
                tile |= likelihoods(reference, logits, labels.flatten()[span])
                for name, values in tile.items():
                    columns.setdefault(name, []).append(values)
        joined = {name: torch.cat(values).cpu().numpy() for name, values in columns.items()}
        return TokenScores(sequence=_sequence(batch), unit=batch.units, **joined)

    def _compare(self, batch: _Batch, hidden: torch.Tensor) -> TokenKl:
        """Compare hidden states [B, L, H]; the head is quantized if the current choices say so."""
        return self._compare_and_sketch(batch, hidden, None)[0]

    @torch.inference_mode()
    def _compare_and_sketch(
        self, batch: _Batch, hidden: torch.Tensor, sketch: LogitSketch | None
    ) -> tuple[TokenKl, torch.Tensor]:
        tiles, sketches = [], [hidden.new_empty(0, dtype=torch.float32)]
        for span, reference, logits in self._tiles(batch, hidden):
            tiles.append(kernels.token_kl(reference, logits))
            if sketch is not None:
                sketches.append(sketch.of(reference, logits, first=span.start))
        kl = torch.cat(tiles).double().cpu().numpy()
        return TokenKl(kl=kl, sequence=_sequence(batch), unit=batch.units), torch.cat(sketches)

    def _tiles(
        self, batch: _Batch, hidden: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield tokens, reference logits and candidate's logits, float32 [T, V], tile by tile."""
        head = self.trunk.head
        ours, theirs = hidden.flatten(0, 1), batch.reference.flatten(0, 1)
        rows = min(self._tile_rows(hidden), len(ours))
        shape = (2, rows, head.weight.shape[0])
        buffers = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(ours), rows):
            span = slice(start, start + rows)
            tile, other = buffers[:, : len(ours[span])]
            reference = batch.logits.get(start)
            if reference is None:
                known = theirs[span].to(ours.device, non_blocking=True)
                keep = _bytes(other) <= self._cache_left
                reference = self._logits(known, head.weight, None if keep else other)
                if keep:
                    self._cache_left -= _bytes(reference)
                    batch.logits[start] = reference
            yield span, reference, self._logits(*self.quantized.operands(head, ours[span]), tile)

    def _tile_rows(self, hidden: torch.Tensor) -> int:
        """Tokens of one logit tile."""
        vocabulary: int = self.trunk.head.weight.shape[0]
        if not hidden.is_cuda:
            return max(1, CPU_TILE_BYTES // (4 * vocabulary))
        rows = max(1, GPU_TILE_BYTES // (4 * vocabulary))
        return rows - rows % GPU_TILE_TOKENS if rows > GPU_TILE_TOKENS else rows

    def _logits(
        self, hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 logits [T, V] of hidden states [T, H] under a head weight [V, H]."""
        bias = self.trunk.head.bias
        if hidden.is_cuda:
            logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
        else:
            wide = self.quantized.products.copies.of(weight)
            logits = torch.mm(hidden.float(), wide.t(), out=out)
        return logits if bias is None else logits.add_(bias.float())


class _Applied:
    """Puts an assignment on for the time of a `with` block, BF16 after it."""

    def __init__(
        self, quantized: QuantizedModel, assignment: Assignment, *, with_cache: bool
    ) -> None:
        self.quantized, self.assignment, self.with_cache = quantized, assignment, with_cache

    def __enter__(self) -> None:
        self.quantized.apply(self.assignment, with_cache=self.with_cache)

    def __exit__(self, *_: object) -> None:
        self.quantized.apply(_BF16)
        self.quantized.forget_inputs()


def _sequence(batch: _Batch) -> Integers:
    rows, length = batch.tokens.shape
    return np.repeat(np.arange(rows), length)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
