"""Scores assignments, and single groups, on batches of a split.

The BF16 model's final hidden states are kept instead of its logits: H numbers a token where the
vocabulary needs V. A candidate runs from the first block in which it differs from one that has
been there. Reused states are those that the forward would compute again, so the KL is the same to
the bit.

Shapes: B sequences, L tokens, H hidden, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, zip_longest
from typing import TypeVar

import torch

from autoquant.data.tokens import Split
from autoquant.forward.again import second_forward
from autoquant.forward.check import check_and_limit
from autoquant.forward.differences import Differences
from autoquant.forward.flow import BF16_MODEL, Flow, entered, walk
from autoquant.forward.head import Head
from autoquant.forward.room import Room
from autoquant.forward.trunk import Part, Trunk
from autoquant.measure.compare import Ahead, Batch, Cache, Comparison, Probed
from autoquant.measure.interactions import Key
from autoquant.measure.kl import TokenKl, TokenScores
from autoquant.measure.ranks.ranks import ALONE, Ranks
from autoquant.measure.ranks.together import together
from autoquant.measure.sketch import LogitSketch
from autoquant.model.live import QuantizedModel
from autoquant.model.memory import return_freed_memory
from autoquant.model.streaming.work import KEPT_LOGIT_BYTES
from autoquant.plan.assignment import Assignment

_Scores = TypeVar("_Scores")


class Scorer:
    """Measures candidates of one model.

    Args:
        quantized: the live model.
        device: where tokens go.
        cache_bytes: memory for block states and reference logits between candidates.
        room: bounds of what goes through the blocks together; those of weights in memory by
            default.
        ranks: the processes that batches are dealt to.
    """

    def __init__(
        self,
        quantized: QuantizedModel,
        device: torch.device,
        *,
        cache_bytes: int = KEPT_LOGIT_BYTES,
        room: Room | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.quantized = quantized
        self.device = device
        self.trunk = Trunk(quantized.model, quantized.products, quantized.weights)
        self.head = Head(self.trunk, quantized)
        self.room = room or Room(device)
        self.ranks = ranks
        self._bf16: dict[int, Flow] = {}
        """Forwards of the BF16 model that probes of the same batches start from."""
        self._ahead: dict[tuple[str, int], Flow] = {}
        """Forwards of the BF16 model that gradients will start from, by split and batch."""
        self.along: Sequence[Flow] = ()
        """Forwards that take the next pass besides."""
        self._cache = Cache(cache_bytes)
        self._comparison = Comparison(self.head, self._cache)
        self._batches: dict[tuple[str, int], Batch] = {}
        self._differences = Differences(self.trunk, quantized)

    def check(self, split: Split) -> None:
        """Verify on one sequence that block by block gives the model's own logits.

        Also finds out whether forwards may start between blocks, and how much fits a GPU.

        Raises:
            SourceError: the model's own forward fails, or its logits are not the head applied to
                the final hidden states, scaled or capped token by token.
        """
        tokens = split.batches[0][:1].to(self.device)
        check_and_limit(self.trunk, self.quantized, self.room, tokens)

    def forward(
        self,
        batches: Sequence[torch.Tensor],
        assignment: Assignment = BF16_MODEL,
        *,
        with_cache: bool = False,
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
        ahead: Ahead | None = None,
    ) -> Iterator[torch.Tensor]:
        """Final hidden states [B, L, H] of batches in one pass over the blocks, each when asked.

        Args:
            batches: tokens [B, L].
            assignment: what the model multiplies with.
            with_cache: whether keys and values are rounded, where there is such a cache.
            inside: makes what is in force while one of them runs a block.
            ahead: what else the BF16 model runs on; `bf16_states` then has this rank's share.
        """
        flows = [
            Flow(parts=parts, assignment=assignment, with_cache=with_cache, inside=inside)
            for parts in map(self._enter, batches)
        ]
        if ahead is None:
            self._walk(flows)
        else:
            split, own = ahead.split, self.ranks.dealt(ahead.batches)
            found = self.bf16_states(split, own, with_noise=ahead.with_noise, beside=flows)
            self._ahead = {(split.digest, i): flow for i, flow in zip(own, found, strict=True)}
        return (flow.hidden for flow in flows)

    def waves(
        self, split: Split, batches: Sequence[int], *, forwards: int
    ) -> Iterator[Sequence[int]]:
        """Batches that go through the blocks together, on all ranks, with so many forwards each."""
        states = forwards * max((self.state_bytes(split, index) for index in batches), default=1)
        return self.room.waves(batches, states, ranks=self.ranks.size)

    def score(self, assignment: Assignment, split: Split) -> TokenKl:
        """KL of a whole assignment on every token of the split."""
        waves = self.waves(split, range(len(split.batches)), forwards=1)
        return TokenKl.joined(
            scores
            for wave in waves
            for (scores,) in self.score_batches([[assignment]] * len(wave), split, wave)
        )

    @together
    def score_batches(
        self, assignments: Sequence[Sequence[Assignment]], split: Split, batches: Sequence[int]
    ) -> list[list[TokenKl]]:
        """KL of assignments on batches, each batch's own, in one pass over the blocks.

        Returns:
            For each batch the scores of its assignments, in their order.
        """
        return self.ranks.gathered(
            lambda: self._measure(
                self.ranks.dealt(assignments),
                split,
                self.ranks.dealt(batches),
                lambda batch, flow: self._comparison.kl(batch, flow.hidden),
            )
        )

    def score_fully(
        self, assignments: Sequence[Assignment], split: Split, *, with_noise: bool = False
    ) -> list[TokenScores]:
        """The KL of each assignment on the split, with agreement, likelihoods and what is clipped.

        Args:
            assignments: group to choice.
            split: the tokens.
            with_noise: measure what `noise` says on the way.
        """
        waves = self.waves(split, range(len(split.batches)), forwards=len(assignments))
        batches = [
            own
            for wave in waves
            for own in self._score_batches_fully(assignments, split, wave, with_noise)
        ]
        return [TokenScores.joined(scores) for scores in zip(*batches, strict=True)]

    @together
    def _score_batches_fully(
        self,
        assignments: Sequence[Assignment],
        split: Split,
        batches: Sequence[int],
        with_noise: bool,
    ) -> list[list[TokenScores]]:
        own = self.ranks.dealt(batches)

        def measured() -> list[list[TokenScores]]:
            found = self._measure(
                [assignments] * len(own),
                split,
                own,
                lambda batch, flow: replace(
                    self._comparison.fully(batch, flow.hidden), clipped=flow.clipped()
                ),
                counted=True,
                with_noise=with_noise,
            )
            for index in own:  # nobody asks for these tokens again
                self._cache.left += self._batch(split, index).drop_logits()
            return_freed_memory()
            return found

        return self.ranks.gathered(measured)

    def probe(
        self, split: Split, probes: Sequence[tuple[int, Key]], sketch: LogitSketch | None = None
    ) -> Iterator[Probed]:
        """Measure groups, each alone in its choice, the rest in BF16.

        Args:
            split: the tokens.
            probes: batch and (group, choice) of each, those of a batch behind each other.
            sketch: how logit changes are kept.

        Yields:
            Each probe's KL and logit change; those of a batch in their order, of batches that
            several ranks share in turn.
        """
        left = Counter(index for index, _ in probes)
        for by_rank in self._rounds(split, probes):
            left.subtract(index for own in by_rank for index, _ in own)
            yield from chain.from_iterable(self._probe_round(split, by_rank, sketch, dict(left)))

    def _rounds(
        self, split: Split, probes: Sequence[tuple[int, Key]]
    ) -> Iterator[Sequence[Sequence[tuple[int, Key]]]]:
        """What each rank probes in one pass over its blocks, each batch on one rank."""
        batches, size = list(dict.fromkeys(index for index, _ in probes)), self.ranks.size
        state_bytes = max((self.state_bytes(split, index) for index in batches), default=1)
        rank_of = {index: place % size for place, index in enumerate(batches)}
        by_rank = [[p for p in probes if rank_of[p[0]] == rank] for rank in range(size)]
        passes = (self.room.together(own, state_bytes) for own in by_rank)
        return zip_longest(*passes, fillvalue=())

    @together
    def _probe_round(
        self,
        split: Split,
        by_rank: Sequence[Sequence[tuple[int, Key]]],
        sketch: LogitSketch | None,
        later: Mapping[int, int],
    ) -> list[list[Probed]]:
        """The probes of each rank; `later` are those of each batch that are still to come."""
        own = by_rank[self.ranks.number]
        return self.ranks.all_of(lambda: [*self._probed(split, own, sketch, later)])

    def _probed(
        self,
        split: Split,
        probes: Sequence[tuple[int, Key]],
        sketch: LogitSketch | None,
        later: Mapping[int, int],
    ) -> Iterator[Probed]:
        """Probes in one pass over the blocks, from where each leaves the BF16 model."""
        bf16 = {
            index: self._bf16.get(index)
            or Flow(parts=self._parts(split, index), keep=later[index] > 0)
            for index in dict.fromkeys(index for index, _ in probes)
        }
        flows = [self._probe(bf16[index], key) for index, key in probes]
        self._walk([*(flow for flow in bf16.values() if not flow.is_done), *flows])
        for index, flow in bf16.items():
            self._keep_reference(split, index, flow)
        self._bf16 = {index: flow for index, flow in bf16.items() if later[index]}
        for (index, key), flow in zip(probes, flows, strict=True):
            with self.applied(flow):
                batch = self._batch(split, index)
                kl, change = self._comparison.kl_and_sketch(batch, flow.hidden, sketch)
            yield Probed(batch=index, key=key, kl=kl, sketch=change.cpu())

    def bf16_states(
        self,
        split: Split,
        batches: Sequence[int],
        *,
        with_noise: bool = False,
        beside: Sequence[Flow] = (),
    ) -> list[Flow]:
        """Forwards of the BF16 model at their end, with the states between blocks.

        Those that went along in an earlier pass are there, and are given away.

        Args:
            split: the tokens.
            batches: of it.
            with_noise: measure what `noise` says on the way.
            beside: forwards that take the same pass.
        """
        flows = [
            self._ahead.pop((split.digest, index))
            if (split.digest, index) in self._ahead
            else Flow(parts=self._parts(split, index), keep=True)
            for index in batches
        ]
        again = self._again(split, batches, with_noise)
        self._walk([*(flow for flow in flows if not flow.is_done), *again, *beside])
        for index, flow in zip(batches, flows, strict=True):
            self._keep_reference(split, index, flow)
        self._keep_noise(split, again)
        return flows

    def probe_head(
        self, bf16: Flow, split: Split, index: int, keys: Sequence[Key]
    ) -> Iterator[TokenKl]:
        """Measure groups behind all blocks on a batch, each alone in its choice.

        Args:
            bf16: the BF16 model's forward of the batch.
            split: the tokens.
            index: of the batch.
            keys: (group, choice) pairs.
        """
        for key in keys:
            flow = self._probe(bf16, key)
            with self.applied(flow):
                yield self._comparison.kl(self._batch(split, index), bf16.hidden)

    def noise(self, split: Split) -> TokenKl:
        """KL between two BF16 runs of the first batch; see `second_forward`."""
        batch = self._batch(split, 0)
        if batch.noise is None:
            self._measure([()], split, [0], lambda *_: None, with_noise=True)
        assert batch.noise is not None
        return batch.noise

    def _again(self, split: Split, indices: Sequence[int], wanted: bool) -> list[Flow]:
        """A second BF16 forward of the first batch, if it is among these and its noise wanted."""
        if not wanted or 0 not in indices or self._batch(split, 0).noise is not None:
            return []
        return [second_forward(self.trunk, self.room, self._batch(split, 0).tokens)]

    def _keep_noise(self, split: Split, again: Sequence[Flow]) -> None:
        for flow in again:
            self._batch(split, 0).noise = self._comparison.kl(self._batch(split, 0), flow.hidden)

    @together
    def forget(self, split: Split) -> None:
        """Give back what is kept of a split."""
        for index in range(len(split.batches)):
            batch = self._batches.pop((split.digest, index), None)
            if batch is not None:
                self._cache.left += batch.bytes

    def _batch(self, split: Split, index: int) -> Batch:
        key = (split.digest, index)
        if key not in self._batches:
            tokens = split.batches[index].to(self.device)
            self._batches[key] = Batch(tokens, split.units[index])
        return self._batches[key]

    def state_bytes(self, split: Split, index: int) -> int:
        """Of the states of one batch between two blocks."""
        return self.trunk.state_bytes(split.batches[index].numel())

    def _parts(self, split: Split, index: int) -> tuple[Part, ...]:
        return self._enter(self._batch(split, index).tokens)

    def _enter(self, tokens: torch.Tensor) -> tuple[Part, ...]:
        return entered(self.trunk, self.room, self.room.parts(tokens.to(self.device)))

    def _walk(self, flows: Sequence[Flow]) -> None:
        besides = [flow for flow in self.along if not flow.is_done]
        walk(self.trunk, self.quantized, self.room, [*flows, *besides])

    def _keep_reference(self, split: Split, index: int, bf16: Flow) -> None:
        batch = self._batch(split, index)
        if batch.reference is None:
            batch.reference = bf16.output

    def _probe(self, bf16: Flow, key: Key) -> Flow:
        """The forward of one group in a choice, from where it leaves the BF16 model's."""
        return Flow(
            parts=bf16.parts,
            assignment=Assignment.of(dict([key])),
            start=self._differences.first_stage(key[0]),
            after=bf16,
        )

    def _measure(
        self,
        assignments: Sequence[Sequence[Assignment]],
        split: Split,
        indices: Sequence[int],
        compare: Callable[[Batch, Flow], _Scores],
        *,
        counted: bool = False,
        with_noise: bool = False,
    ) -> list[list[_Scores]]:
        """Scores of each batch's assignments on it, in one pass over the blocks.

        Args:
            assignments: of each batch.
            split: the tokens.
            indices: of the batches.
            compare: the BF16 model's forward of a batch with another, whose choices are in force.
            counted: whether what is clipped of inputs is counted.
            with_noise: whether what `noise` says is measured on the way.
        """
        batches = [self._batch(split, index) for index in indices]
        references = {
            index: Flow(parts=self._enter(batch.tokens))
            for index, batch in zip(indices, batches, strict=True)
            if batch.reference is None
        }
        again = self._again(split, indices, with_noise)
        candidates = [
            self._candidates(batch, own, counted)
            for batch, own in zip(batches, assignments, strict=True)
        ]
        self._walk([*references.values(), *again, *chain.from_iterable(candidates)])
        for index, flow in references.items():
            self._keep_reference(split, index, flow)
        self._keep_noise(split, again)
        found = []
        for batch, flows in zip(batches, candidates, strict=True):
            scores = []
            for flow in flows:
                with self.applied(flow):
                    scores.append(compare(batch, flow))
                if flow.keep:
                    batch.previous = flow
            found.append(scores)
        return found

    def _candidates(
        self, batch: Batch, assignments: Sequence[Assignment], counted: bool
    ) -> list[Flow]:
        """The forwards of assignments, each from where it leaves one that has been there."""
        before = batch.previous
        if counted and before is not None and before.clips is None:
            before = None
        parts = self._enter(batch.tokens) if before is None else before.parts
        keep = len(assignments) == 1 and (before is not None or self._may_keep(parts))
        return self._differences.forwards(parts, assignments, before, keep=keep, counted=counted)

    def _may_keep(self, parts: Sequence[Part]) -> bool:
        """Whether memory holds the states of a forward, which then is taken."""
        size = sum(part.state.numel() * part.state.element_size() for part in parts)
        return not self.trunk.is_whole and self._cache.take((self.trunk.stages + 1) * size)

    @contextmanager
    def applied(self, flow: Flow) -> Iterator[None]:
        """The choices of a forward in force inside, BF16 after it."""
        self.quantized.apply(flow.assignment, with_cache=flow.with_cache)
        try:
            yield
        finally:
            self.quantized.apply(BF16_MODEL)
            self.quantized.forget_inputs()
