"""The one way through a model: block by block, every forward that is on its way in turn.

    for block: open its weights; for every live forward: state = block(state)

A forward starts at the tokens, or at any block with the state that another forward has there. So
a pass over the weights serves the BF16 model, every probe and several assignments at once, whether
the weights are in memory or are read for it. Each forward goes through a block by itself, so that
products keep their shapes and results do not depend on who else is on the way.

Shapes: B sequences, L tokens, H hidden.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from autoquant.forward.room import Room
from autoquant.forward.trunk import Part, Trunk, Visitor
from autoquant.model.inputs import Clips
from autoquant.model.live import QuantizedModel
from autoquant.model.waiting import waits
from autoquant.plan.assignment import Assignment

BF16_MODEL = Assignment.of({})

States = tuple[torch.Tensor, ...]
"""The states of a batch's parts between two blocks, [b, L, H] each, on the device or the host."""


@dataclass(slots=True, eq=False, kw_only=True)
class Flow:
    """One batch under one assignment, on its way through the stages."""

    parts: tuple[Part, ...]
    """The batch, split into what goes through a stage at once."""
    assignment: Assignment = BF16_MODEL
    with_cache: bool = False
    """Whether keys and values are rounded as the cache of the assignment does."""
    start: int = 0
    """First stage that it runs; with the number of stages none."""
    after: "Flow | None" = None
    """A forward of the same batch that agrees with this one before `start`."""
    keep: bool = False
    """Whether other forwards may later start anywhere between stages."""
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Makes what is in force while it runs a stage, and for no other forward."""
    clips: dict[int, Clips] | None = None
    """What it clips of its inputs in each stage, where that is counted."""
    states: States = ()
    boundaries: list[States] = field(default_factory=list)
    """States before each stage, where they are kept."""
    finals: States = ()
    """The states behind the last stage, where the others are kept."""
    output: torch.Tensor | None = None
    """What `hidden` says, where it is kept."""
    room: Room | None = None
    """Says where it is computed with."""

    @property
    def hidden(self) -> torch.Tensor:
        """Final hidden states as the head reads them, [B, L, H], on the device."""
        assert self.output is not None, "the forward is still on its way"
        return self.output if self.room is None else self.room.on_device(self.output)

    @classmethod
    def ended(cls, hidden: torch.Tensor) -> Self:
        """A forward of which the final hidden states alone are known."""
        return cls(parts=(), output=hidden)

    @classmethod
    def of_assignment(cls, assignment: Assignment, *, with_cache: bool) -> Self:
        """One without tokens, which says what is in force."""
        return cls(parts=(), assignment=assignment, with_cache=with_cache)

    @property
    def is_done(self) -> bool:
        return self.output is not None

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        tensors = [state for states in self.boundaries for state in states]
        if self.output is not None:
            tensors.append(self.output)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def clipped(self) -> dict[str, tuple[int, int]]:
        """Input elements of each set that it clipped, and all that it quantized, as far as that is
        counted.
        """
        found: dict[str, tuple[int, int]] = {}
        for clips in (self.clips or {}).values():
            for name, (beyond, elements) in clips.counted().items():
                before = found.get(name, (0, 0))
                found[name] = before[0] + beyond, before[1] + elements
        return found

    def begin(self) -> None:
        """Take the state before `start`, from the tokens or the other forward."""
        if self.after is None:
            self.states = tuple(part.state for part in self.parts)
            return
        self._take_clips(self.after)
        known = self.after.boundaries
        self.states = known[self.start] if self.start < len(known) else self.after.states
        if self.keep:
            self.boundaries = known[: self.start]
        self.after = None

    def _take_clips(self, other: "Flow") -> None:
        """Count what the stages before `start` clip, which only the other forward runs."""
        if self.clips is not None:
            assert other.clips is not None, "the other forward counts nothing"
            self.clips |= {s: own for s, own in other.clips.items() if s < self.start}

    def advance(self, trunk: Trunk, stage: int, room: Room) -> None:
        """Run a stage, whose weights are there.

        Args:
            trunk: the model.
            stage: the next one.
            room: says where states are kept.
        """
        before = self.states
        if self.keep:
            self.boundaries.append(before)
        self.states = tuple(
            room.stored(trunk.advance(stage, part, room.on_device(state)))
            for part, state in zip(self.parts, before, strict=True)
        )

    def finish(self, trunk: Trunk, room: Room) -> None:
        """Compute the final hidden states; the last state is not needed any more."""
        if self.after is not None:  # it differs behind the last stage alone
            self._take_clips(self.after)
            self.output, self.room = self.after.output, self.after.room
            self.boundaries = self.after.boundaries
            self.after = None
            return
        found = [
            trunk.finish(part, room.on_device(state))
            for part, state in zip(self.parts, self.states, strict=True)
        ]
        self.output = room.stored(found[0] if len(found) == 1 else torch.cat(found))
        self.room = room
        self.states, self.finals = (), self.states if self.keep else ()


@dataclass(slots=True)
class Flows:
    """The visitor that takes forwards through each stage."""

    trunk: Trunk
    quantized: QuantizedModel
    room: Room
    flows: Sequence[Flow]

    @torch.no_grad()
    def visit(self, stage: int) -> None:
        for flow in self.flows:
            if flow.start == stage:
                flow.begin()
        alive = [flow for flow in self.flows if flow.start <= stage]
        try:
            for flow in self._by_weights(stage, alive):
                self.quantized.apply(flow.assignment, with_cache=flow.with_cache)
                with flow.inside(), self._counting(flow, stage):
                    flow.advance(self.trunk, stage, self.room)
        finally:
            self.quantized.apply(BF16_MODEL)
            self.quantized.forget_inputs()

    def _counting(self, flow: Flow, stage: int) -> AbstractContextManager[None]:
        """Count what a forward clips in a stage, where it is to."""
        if flow.clips is None:
            return nullcontext()
        return self.quantized.counting(flow.clips.setdefault(stage, Clips()))

    def _by_weights(self, stage: int, flows: Sequence[Flow]) -> list[Flow]:
        """Forwards that multiply with the same weights behind each other, since memory holds the
        codes and decoded weights that were used last.
        """
        here = [g for g in self.quantized.groups if self.trunk.stage_of(g.layer) == stage]
        largest_first = sorted(here, key=lambda group: -group.elements)
        names = [group.name for group in largest_first]
        return sorted(flows, key=lambda flow: [str(flow.assignment[name]) for name in names])

    @torch.no_grad()
    def finish(self) -> None:
        """Compute the final hidden states of all."""
        for flow in self.flows:
            flow.finish(self.trunk, self.room)


@torch.no_grad()
def entered(trunk: Trunk, room: Room, parts: Iterable[torch.Tensor]) -> tuple[Part, ...]:
    """Parts of a batch, int64 [b, L] on the device each, as they enter the first stage."""
    found = map(trunk.enter, parts)
    return tuple(replace(part, state=room.stored(part.state)) for part in found)


def loop(
    trunk: Trunk, visitors: Iterable[Visitor], *, first: int = 0, backwards: bool = False
) -> None:
    """Let visitors see every stage from `first` on, each while its weights are there."""
    waits.adapt()
    stages = range(first, trunk.stages)
    visitors = tuple(visitors)
    for stage in reversed(stages) if backwards else stages:
        with trunk.open(stage):
            for visitor in visitors:
                visitor.visit(stage)


def walk(trunk: Trunk, quantized: QuantizedModel, room: Room, flows: Sequence[Flow]) -> None:
    """Take forwards to their final hidden states in one pass over the stages."""
    visitor = Flows(trunk, quantized, room, flows)
    loop(trunk, [visitor], first=min((flow.start for flow in flows), default=trunk.stages))
    visitor.finish()
