"""Second moments of the inputs of quantized weights, in BF16 on the calibration split.

Rows count by what gradients say of them (`weighing.py`). Then sequences go through the model one at
a time and block by block: a block's sums are what memory holds, time grows with the number of
blocks, and a sum does not depend on how tokens are batched. Every fourth sequence is held out: its
products are summed apart.

Shapes: R rows that a weight multiplies, K inputs.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from autoquant.codes.row_weights import RowWeights
from autoquant.codes.statistics import StatisticsStore
from autoquant.data.tokens import Split
from autoquant.formats.moments import Moments
from autoquant.forward.flow import Flow, entered, loop
from autoquant.measure.gradient import NoGradient
from autoquant.measure.ranks.together import together
from autoquant.measure.scorer import Scorer
from autoquant.measure.statistics.sums import Sums
from autoquant.measure.statistics.taps import InputTaps
from autoquant.measure.statistics.weighing import weigh_rows
from autoquant.model.live import QuantizedModel
from autoquant.plan.linears import LayerGroup

HELD_OUT_OF = 4
"""One sequence of so many is held out."""


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
        store: where each block's moments go when they are complete.
        advance: called after each sequence that was weighed, and after each stage of the model.
    """
    missing = {
        layer: own
        for layer, own in by_layer(groups).items()
        if not store.has(layer, {linear.input_scale_set for g in own for linear in g.linears})
    }
    if not missing:
        return
    sequences = [row[None].to(scorer.device) for batch in split.batches for row in batch]
    weights = _weights(scorer, sequences, by_layer(groups), store, advance)
    collector = _Collector(scorer, sequences, missing, weights, store, advance)
    loop(scorer.trunk, [collector])
    collector.finish()


def _weights(
    scorer: Scorer,
    sequences: Sequence[Tensor],
    groups: Mapping[int | None, Sequence[LayerGroup]],
    store: StatisticsStore,
    advance: Callable[[], None],
) -> Mapping[str, RowWeights]:
    """How much rows count by input set, from the store or measured; nothing where all count alike,
    since the model has no backward pass.
    """
    kept = store.rows()
    if kept is not None:
        return kept
    try:
        found, why = weigh_rows(scorer, sequences, groups, advance), None
    except NoGradient as error:
        found, why = {}, str(error)
    store.write_rows(found, why)
    return found


def collect_of_block(
    scorer: Scorer,
    sequences: Sequence[Tensor],
    groups: Collection[LayerGroup],
    store: StatisticsStore,
) -> None:
    """Keep the moments of the groups of one block, which sees sequences as they enter the first.

    Args:
        scorer: all groups in BF16.
        sequences: int64 [1, L] each, on the device.
        groups: of the block.
        store: where its moments go.
    """
    (layer,) = by_layer(groups)
    stage = scorer.trunk.stage_of(layer)
    collector = _Collector(scorer, sequences, {layer: groups}, {}, store, lambda: None)
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


def is_held_out(sequence: int) -> bool:
    """Whether a sequence of the split, counted from 0, is held out."""
    return sequence % HELD_OUT_OF == 1


def weights_of(known: RowWeights | None, sequence: int, matrix: int, rows: Tensor) -> Tensor | None:
    """The weights [R, 1] of rows [R, K] that a matrix multiplies in a sequence; None where they are
    not known.
    """
    if known is None:
        return None
    found = known.of(sequence, matrix)
    return found[:, None].to(rows.device) if len(found) == len(rows) else None


def by_layer(groups: Iterable[LayerGroup]) -> dict[int | None, list[LayerGroup]]:
    """Groups of each block, and of none."""
    found: dict[int | None, list[LayerGroup]] = {}
    for group in groups:
        found.setdefault(group.layer, []).append(group)
    return found


class _Collector:
    """The visitor that takes sequences through each stage and keeps what its weights multiply.

    Args:
        scorer: all groups in BF16.
        sequences: int64 [1, L] each.
        missing: groups of every layer whose moments are wanted.
        weights: of rows, by input set; those of others count alike.
        store: where each layer's go.
        advance: called after each stage.
    """

    def __init__(
        self,
        scorer: Scorer,
        sequences: Sequence[Tensor],
        missing: Mapping[int | None, Collection[LayerGroup]],
        weights: Mapping[str, RowWeights],
        store: StatisticsStore,
        advance: Callable[[], None],
    ) -> None:
        self._scorer, self._missing, self._store = scorer, missing, store
        self._weights, self._advance = weights, advance
        self.flows = [Flow(parts=entered(scorer.trunk, scorer.room, [own])) for own in sequences]

    @torch.no_grad()
    def visit(self, stage: int) -> None:
        """Run the stage on every sequence, each alone."""
        trunk, room = self._scorer.trunk, self._scorer.room
        layers = [
            layer for layer in self._missing if layer is not None and trunk.stage_of(layer) == stage
        ]
        watches = {layer: self._watch(layer) for layer in layers}
        with ExitStack() as installed:
            for watch in watches.values():
                installed.enter_context(watch.taps.installed())
            for number, flow in enumerate(self.flows):
                for watch in watches.values():
                    watch.sequence = number
                if stage == 0:
                    flow.begin()
                flow.advance(trunk, stage, room)
        for layer, watch in watches.items():
            self._store.write(layer, watch.moments())
        self._advance()

    @torch.no_grad()
    def finish(self) -> None:
        """See what the head multiplies, behind all stages."""
        if None not in self._missing:
            return
        watch = self._watch(None)
        for number, flow in enumerate(self.flows):
            watch.sequence = number
            flow.finish(self._scorer.trunk, self._scorer.room)
            watch.taps.see(self._scorer.trunk.head, flow.hidden)
        self._store.write(None, watch.moments())

    def _watch(self, layer: int | None) -> "_Watch":
        return _Watch(self._scorer.quantized, self._missing[layer], self._weights)


class _Watch:
    """What the input sets of some groups have shown so far.

    Args:
        quantized: the live model.
        groups: of one block.
        weights: of rows, by input set.
    """

    def __init__(
        self,
        quantized: QuantizedModel,
        groups: Collection[LayerGroup],
        weights: Mapping[str, RowWeights],
    ) -> None:
        self.sequence = 0
        self._weights = weights
        self.taps = InputTaps(quantized, groups, self._see)
        self._sums = {name: Sums.zeros(shape) for name, shape in self.taps.sets.items()}

    def _see(self, name: str, matrix: int, rows: Tensor, _: Tensor | None) -> None:
        """Add rows [R, K] to what an input set has shown one of its matrices."""
        weights = weights_of(self._weights.get(name), self.sequence, matrix, rows)
        wide = rows.float() if weights is None else rows.float() * weights.sqrt()
        self._sums[name].add(wide, wide, int(is_held_out(self.sequence)), matrix)

    def moments(self) -> dict[str, Moments]:
        """Of every input set."""
        return {name: own.moments() for name, own in self._sums.items()}
