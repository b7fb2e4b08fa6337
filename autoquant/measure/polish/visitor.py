"""The polish: blocks in order, each refitted and rounded on inputs that the polished ones give.

Two forwards of all calibration sequences go through the blocks: the BF16 model's, and one under
the polished assignment. A group shows both what its weights multiply, the groups before it in the
block polished already, and then takes the codes that answer the second forward's inputs as the BF16
weights answer the first's. Codes are kept group by group: a killed polish goes on behind the last.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from autoquant.codes.row_weights import RowWeights
from autoquant.data.tokens import Split
from autoquant.formats import REFIT
from autoquant.forward.flow import BF16_MODEL, Flow, loop
from autoquant.measure.polish.drift import DriftWatch
from autoquant.measure.ranks.together import together
from autoquant.measure.scorer import Scorer
from autoquant.measure.statistics.chunks import Chunk, chunks_of
from autoquant.measure.statistics.taps import InputTaps
from autoquant.measure.statistics.weighing import row_weights
from autoquant.plan.assignment import Assignment
from autoquant.plan.linears import LayerGroup

_Run = Callable[[Flow, InputTaps], None]
"""Lets taps see what a flow's next stage multiplies."""


def polish(
    scorer: Scorer, split: Split, assignment: Assignment, advance: Callable[[], None]
) -> None:
    """Make the refitted codes of an assignment; those that are kept already are left alone.

    Args:
        scorer: calibrated; its model uses this polish (`QuantizedModel.use_polish`).
        split: the calibration tokens.
        assignment: some of whose choices have the rounding `refit`.
        advance: called after each stage of the model.
    """
    quantized = scorer.quantized
    refitted = [group for group in quantized.groups if assignment[group.name].rounding == REFIT]
    missing = [own for own in refitted if not quantized.book.has(own, assignment[own.name])]
    if not missing:
        return
    chunks, weights = chunks_of(scorer, split), {}
    if quantized.statistics is not None:
        weights = row_weights(scorer, chunks, refitted, quantized.statistics, lambda: None)
    polisher = _Polisher(scorer, chunks, assignment, missing, weights, advance)
    loop(scorer.trunk, [polisher])
    polisher.finish()


@together
def use_polish(
    scorer: Scorer,
    split: Split,
    assignment: Assignment,
    key: str,
    *,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Let every rank measure with the refitted codes of an assignment, and make what is missing.

    Args:
        scorer, split, assignment, advance: as for `polish`.
        key: names the codes.
    """
    scorer.quantized.use_polish(key)
    scorer.ranks.leader_first(lambda: polish(scorer, split, assignment, advance))


class _Polisher:
    """The visitor that takes both forwards through each stage and makes its codes in between.

    Args:
        scorer: calibrated.
        chunks: of calibration sequences.
        assignment: the polished one.
        missing: groups without codes, in the order of the forward pass.
        weights: of rows in the BF16 model, by input set; others count alike.
        advance: called after each stage.
    """

    def __init__(
        self,
        scorer: Scorer,
        chunks: Sequence[Chunk],
        assignment: Assignment,
        missing: Sequence[LayerGroup],
        weights: Mapping[str, RowWeights],
        advance: Callable[[], None],
    ) -> None:
        self._scorer, self._quantized = scorer, scorer.quantized
        self._assignment, self._advance = assignment, advance
        self._missing, self._weights = missing, weights
        self._chunks = chunks
        self._bf16 = [chunk.flow(scorer) for chunk in chunks]
        self._polished = [Flow(parts=own.parts) for own in self._bf16]

    @torch.no_grad()
    def visit(self, stage: int) -> None:
        """Make what is missing of the stage, then run it on every chunk."""
        trunk, room = self._scorer.trunk, self._scorer.room
        if stage == 0:
            for flow in (*self._bf16, *self._polished):
                flow.begin()
        for group in self._missing_at(stage):
            self._make(group, lambda flow, _: self._run(flow, stage))
        for flows, assignment in ((self._bf16, BF16_MODEL), (self._polished, self._assignment)):
            with self._applied(assignment):
                for flow in flows:
                    flow.advance(trunk, stage, room)
        self._advance()

    @torch.no_grad()
    def finish(self) -> None:
        """Make the codes of a head, behind all stages."""
        for group in self._missing_at(self._scorer.trunk.stages):
            self._make(group, self._finish)

    def _missing_at(self, stage: int) -> list[LayerGroup]:
        stage_of = self._scorer.trunk.stage_of
        return [group for group in self._missing if stage_of(group.layer) == stage]

    def _make(self, group: LayerGroup, run: _Run) -> None:
        """Make the codes of a group from what it multiplies in both forwards.

        Its input sets follow each other as they do in the forward: what the down projections of
        experts multiply depends on the codes of the others.
        """
        sets = self._in_order(group, run)
        index = self._quantized.groups.index(group)
        for number, name in enumerate(sets):
            made = self._quantized.groups[: index + (number > 0)]
            polished = Assignment.of({own.name: self._assignment[own.name] for own in made})
            watch = DriftWatch(self._quantized, group, [name], self._weights, self._chunks[0])
            self._watch(watch, polished, run)
            self._quantized.refit(
                group,
                self._assignment[group.name],
                watch.statistics(),
                is_whole=name == sets[-1],
            )

    def _watch(self, watch: DriftWatch, polished: Assignment, run: _Run) -> None:
        """Let it see both forwards of every chunk."""
        with watch.taps.installed():
            for chunk, bf16, own in zip(self._chunks, self._bf16, self._polished, strict=True):
                watch.sees_bf16(chunk)
                self._shown(BF16_MODEL, bf16, watch, run)
                watch.sees_polished()
                self._shown(polished, own, watch, run)

    def _shown(self, assignment: Assignment, flow: Flow, watch: DriftWatch, run: _Run) -> None:
        with self._applied(assignment):
            run(flow, watch.taps)

    def _in_order(self, group: LayerGroup, run: _Run) -> list[str]:
        """The input sets of a group in the order in which a forward reads them."""
        seen: dict[str, None] = {}
        taps = InputTaps(self._quantized, [group], lambda name, *_: seen.update({name: None}))
        if len(taps.sets) > 1:
            with taps.installed():
                run(self._bf16[0], taps)
        return [*seen, *(name for name in taps.sets if name not in seen)]

    def _run(self, flow: Flow, stage: int) -> None:
        """Let the taps see a stage, whose output is not wanted yet."""
        for part, state in zip(flow.parts, flow.states, strict=True):
            self._scorer.trunk.advance(stage, part, self._scorer.room.on_device(state))

    def _finish(self, flow: Flow, taps: InputTaps) -> None:
        """Let the taps see what the head multiplies."""
        if not flow.is_done:
            flow.finish(self._scorer.trunk, self._scorer.room)
        taps.see(self._scorer.trunk.head, flow.hidden)

    @contextmanager
    def _applied(self, assignment: Assignment) -> Iterator[None]:
        self._quantized.apply(assignment, with_cache=assignment is not BF16_MODEL)
        try:
            yield
        finally:
            self._quantized.apply(BF16_MODEL)
            self._quantized.forget_inputs()
