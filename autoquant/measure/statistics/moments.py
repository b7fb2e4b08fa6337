"""Second moments of the inputs of quantized weights, in BF16 on the calibration split.

Rows count by what gradients say of them (`weighing.py`). A block's sums are what memory holds, time
grows with the number of blocks, and a sum does not depend on how tokens are batched. Every fourth
sequence is held out: its products are summed apart.

Shapes: R rows that a weight multiplies, K inputs.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from autoquant.codes.row_weights import RowWeights
from autoquant.codes.statistics import StatisticsStore
from autoquant.data.tokens import Split
from autoquant.formats.moments import Moments
from autoquant.forward.flow import Flow, loop, walk
from autoquant.measure.compare import Ahead
from autoquant.measure.gradient import NoGradient, backward_passes, states_of
from autoquant.measure.ranks.together import together
from autoquant.measure.scorer import Scorer
from autoquant.measure.statistics.chunks import Chunk, chunks_of, states_bytes
from autoquant.measure.statistics.sums import Sums
from autoquant.measure.statistics.taps import InputTaps
from autoquant.measure.statistics.weighing import (
    ByLayer,
    Sizes,
    Weigher,
    by_layer,
    input_sets,
    layers_at,
    row_weights,
)
from autoquant.model.live import QuantizedModel
from autoquant.plan.linears import LayerGroup

WeightsOfSet = Callable[[str], RowWeights | None]
"""Of the rows of an input set; None where they count alike."""


def collect_moments(
    scorer: Scorer,
    split: Split,
    groups: Collection[LayerGroup],
    store: StatisticsStore,
    advance: Callable[[], None],
) -> None:
    """Keep the moments of the inputs of `groups`; those that are kept already are left alone.

    Args:
        scorer: all groups in BF16.
        split: the calibration tokens.
        groups: whose codes rest on their inputs.
        store: where each block's moments go when they are complete, and the weights of rows.
        advance: called after each chunk that was weighed, and after each stage of the model.
    """
    missing = {
        layer: own
        for layer, own in by_layer(groups).items()
        if not store.has(layer, input_sets(own))
    }
    along, scorer.along = scorer.along, ()
    is_weighed = store.rows(input_sets(groups)) is not None
    if not missing and is_weighed:
        return
    chunks = chunks_of(scorer, split)
    if not is_weighed and _goes_in_one_pass(scorer, chunks):
        try:
            _collect_backwards(scorer, chunks, along, by_layer(groups), store, advance)
            return
        except NoGradient as error:
            missing = by_layer(groups)
            store.remove(missing)  # of blocks that gradients have reached, whose rows were weighed
            store.count_alike(str(error))
    weights = row_weights(scorer, chunks, groups, store, advance)
    collector = _Collector(scorer, chunks, missing, weights.get, store, advance)
    loop(scorer.trunk, [collector])
    collector.finish()


def steps_of(scorer: Scorer, split: Split) -> int:
    """How often `collect_moments` says that it has advanced, where nothing is kept."""
    return scorer.trunk.stages + len(chunks_of(scorer, split))


def take_along(scorer: Scorer, split: Split, ahead: Ahead | None) -> None:
    """Let what `collect_moments` begins with take the next pass, which calibrates, if that saves
    one and memory holds the states.

    Args:
        scorer: all groups in BF16.
        split: the calibration tokens.
        ahead: what else goes along.
    """
    chunks = chunks_of(scorer, split)
    beside = states_bytes(scorer, chunks)
    if ahead is not None:
        beside += scorer.trunk.stages * states_of(scorer, ahead.split, ahead.batches)
    if _goes_in_one_pass(scorer, chunks, beside=beside):
        scorer.along = [chunk.flow(scorer, keep=True) for chunk in chunks]


def _goes_in_one_pass(scorer: Scorer, chunks: Sequence[Chunk], *, beside: int = 0) -> bool:
    """Whether rows are weighed and summed in one pass back over weights that are brought for it.

    Args:
        scorer: of the model.
        chunks: all sequences.
        beside: bytes of states that memory holds at the same time.
    """
    states = scorer.trunk.stages * states_bytes(scorer, chunks) + beside
    return scorer.room.is_streamed and states <= scorer.room.walk_bytes


def collect_of_block(
    scorer: Scorer,
    chunks: Sequence[Chunk],
    groups: Collection[LayerGroup],
    store: StatisticsStore,
) -> None:
    """Keep the moments of the groups of one block, which sees sequences as they enter the first.

    Args:
        scorer: all groups in BF16.
        chunks: of sequences.
        groups: of the block.
        store: where its moments go.
    """
    (layer,) = by_layer(groups)
    stage = scorer.trunk.stage_of(layer)
    collector = _Collector(scorer, chunks, {layer: groups}, lambda _: None, store, lambda: None)
    for flow in collector.flows:
        flow.begin()
    with scorer.trunk.open(stage):
        collector.visit(stage)


@together
def keep_moments(
    scorer: Scorer,
    split: Split,
    groups: Collection[LayerGroup],
    *,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Keep the moments of the inputs of `groups` where the live model finds them.

    The leader sums them alone: a sum of the ranks' sums would depend on their number. A follower
    that does not see the leader's files does the same again.
    """
    store = scorer.quantized.statistics
    assert store is not None, "no place for statistics"
    scorer.ranks.leader_first(lambda: collect_moments(scorer, split, groups, store, advance))


def roots_of(
    known: RowWeights | None, chunk: Chunk, matrix: int, sizes: Sequence[int], rows: Tensor
) -> Tensor:
    """Square roots of the weights of rows [R, K] that a matrix multiplies in a chunk, float32
    [R, 1]; ones in sequences where these are not known.

    Args:
        known: of their input set.
        chunk: of the sequences.
        matrix: of the set.
        sizes: how many rows each sequence has.
        rows: say where the roots belong.
    """
    found = []
    for sequence, size in enumerate(sizes, chunk.first):
        own = None if known is None else known.of(sequence, matrix)
        found.append(torch.ones(size) if own is None or len(own) != size else own)
    return torch.cat(found)[:, None].to(rows.device).sqrt()


def _collect_backwards(
    scorer: Scorer,
    chunks: Sequence[Chunk],
    along: Sequence[Flow],
    groups: ByLayer,
    store: StatisticsStore,
    advance: Callable[[], None],
) -> None:
    """Weigh and sum in one pass back over the blocks; a kill loses all of it.

    Args:
        scorer, store, advance: as for `collect_moments`.
        chunks: all sequences.
        along: their forwards, where these are on their way or at their end.
        groups: of every layer.

    Raises:
        NoGradient: an architecture or a kernel without a backward pass.
    """
    flows = along or [chunk.flow(scorer, keep=True) for chunk in chunks]
    walk(scorer.trunk, scorer.quantized, scorer.room, [own for own in flows if not own.is_done])
    sizes = Sizes(sum(len(chunk.tokens) for chunk in chunks))
    collector = _Collector(scorer, chunks, groups, sizes.of, store, advance, flows)
    with backward_passes():
        weigher = Weigher(scorer, chunks, flows, groups, sizes)
    for _ in chunks:
        advance()
    collector.finish()
    loop(scorer.trunk, [_Backwards(weigher, collector)], backwards=True)
    store.write_rows(sizes.weights(), input_sets(own for of in groups.values() for own in of))


class _Backwards:
    """The visitor that weighs the rows of each stage, and then sums them."""

    def __init__(self, weigher: Weigher, collector: "_Collector") -> None:
        self._weigher, self._collector = weigher, collector

    def visit(self, stage: int) -> None:
        """Take the gradients through the stage, and the states before it once more."""
        states = [flow.boundaries[-1] for flow in self._collector.flows]
        with backward_passes():
            self._weigher.visit(stage)
        self._collector.visit_from(stage, states)


class _Collector:
    """The visitor that takes sequences through each stage and keeps what its weights multiply.

    Args:
        scorer: all groups in BF16.
        chunks: of sequences.
        missing: groups of every layer whose moments are wanted.
        weights: of rows.
        store: where each layer's moments go.
        advance: called after each stage.
        flows: the forward of each chunk, if it is at its end.
    """

    def __init__(
        self,
        scorer: Scorer,
        chunks: Sequence[Chunk],
        missing: Mapping[int | None, Collection[LayerGroup]],
        weights: WeightsOfSet,
        store: StatisticsStore,
        advance: Callable[[], None],
        flows: Sequence[Flow] = (),
    ) -> None:
        self._scorer, self._chunks, self._missing = scorer, chunks, missing
        self._weights, self._store, self._advance = weights, store, advance
        self.flows = flows or [chunk.flow(scorer) for chunk in chunks]

    @torch.no_grad()
    def visit(self, stage: int) -> None:
        """Run the stage on every chunk."""
        if stage == 0:
            for flow in self.flows:
                flow.begin()
        trunk, room = self._scorer.trunk, self._scorer.room
        self._see(stage, [partial(flow.advance, trunk, stage, room) for flow in self.flows])

    @torch.no_grad()
    def visit_from(self, stage: int, states: Sequence[tuple[Tensor, ...]]) -> None:
        """Run the stage on the states before it, without what comes of them."""
        trunk, room = self._scorer.trunk, self._scorer.room

        def run(flow: Flow, state: Tensor) -> None:
            trunk.advance(stage, flow.parts[0], room.on_device(state))

        pairs = zip(self.flows, states, strict=True)
        self._see(stage, [partial(run, flow, state) for flow, (state,) in pairs])

    @torch.no_grad()
    def finish(self) -> None:
        """See what the head multiplies, behind all stages."""
        if None not in self._missing:
            return
        watch = self._watch(None)
        for chunk, flow in zip(self._chunks, self.flows, strict=True):
            watch.chunk = chunk
            if not flow.is_done:
                flow.finish(self._scorer.trunk, self._scorer.room)
            watch.taps.see(self._scorer.trunk.head, flow.hidden)
        self._store.write(None, watch.moments())

    def _see(self, stage: int, runs: Sequence[Callable[[], None]]) -> None:
        """Watch every chunk's run of the stage, and keep what was seen."""
        layers = layers_at(self._missing, self._scorer, stage)
        watches = {layer: self._watch(layer) for layer in layers}
        with ExitStack() as installed:
            for watch in watches.values():
                installed.enter_context(watch.taps.installed())
            for chunk, run in zip(self._chunks, runs, strict=True):
                for watch in watches.values():
                    watch.chunk = chunk
                run()
        for layer, watch in watches.items():
            self._store.write(layer, watch.moments())
        self._advance()

    def _watch(self, layer: int | None) -> "_Watch":
        first, weights = self._chunks[0], self._weights
        return _Watch(self._scorer.quantized, self._missing[layer], weights, first)


class _Watch:
    """What the input sets of some groups have shown so far.

    Args:
        quantized: the live model.
        groups: of one block.
        weights: of rows.
        chunk: the first.
    """

    def __init__(
        self,
        quantized: QuantizedModel,
        groups: Collection[LayerGroup],
        weights: WeightsOfSet,
        chunk: Chunk,
    ) -> None:
        self.chunk = chunk
        """What is in the stage."""
        self.taps = InputTaps(quantized, groups, self._see)
        self._sums = {name: Sums.zeros(shape) for name, shape in self.taps.sets.items()}
        self._weights = {name: weights(name) for name in self.taps.sets}

    def _see(self, name: str, matrix: int, rows: Tensor, tokens: Tensor | None) -> None:
        """Add rows [R, K] to what an input set has shown one of its matrices."""
        sizes = self.chunk.sizes(len(rows), tokens)
        roots = roots_of(self._weights[name], self.chunk, matrix, sizes, rows)
        for part, own in self.chunk.parted(rows.float() * roots, sizes):
            self._sums[name].add(own, own, part, matrix)

    def moments(self) -> dict[str, Moments]:
        """Of every input set."""
        return {name: own.moments() for name, own in self._sums.items()}
