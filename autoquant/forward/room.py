"""How much of forwards is on the device, and in memory, at a time."""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self, TypeVar

import torch

from autoquant.forward.held_states import HeldStates
from autoquant.model.memory import on_host
from autoquant.model.streaming.work import STATE_BYTES, state_bytes

MOST_TOGETHER = 16
"""Forwards that go through weights in memory together. More would save nothing there, and what a
killed process had not written down is lost."""

_Item = TypeVar("_Item")


@dataclass(slots=True)
class Room:
    """Bounds of forwards on one device."""

    device: torch.device
    sequences_at_once: int | None = None
    """How many sequences run through a stage together; None is no limit."""
    graphs_at_once: int | None = None
    """How many of them where the stage keeps what its backward pass needs; None is no limit."""
    device_bytes: int | None = None
    """For states between stages on the device; None is no limit."""
    held: HeldStates = field(default_factory=HeldStates)
    """The states that take of it."""
    spare_bytes: int = 0
    """Of the device, for states beside what is theirs in any case."""
    walk_bytes: int = STATE_BYTES
    """For states of all forwards that are on their way together."""
    most_together: int = MOST_TOGETHER
    batches_together: int = 1
    """Batches that go through the stages together: one where weights are in memory."""
    is_streamed: bool = False
    """Whether weights are brought for each pass, so that as many go together as memory holds."""
    moved_bytes: int = 0
    """Of states that went from the device to the host's memory or back so far."""

    @classmethod
    def streamed(cls, device: torch.device, walk_bytes: int, *, spare_bytes: int = 0) -> Self:
        """Bounds where every pass brings the weights: memory alone, the host's and a GPU's."""
        return cls(
            device,
            spare_bytes=spare_bytes,
            walk_bytes=walk_bytes,
            most_together=sys.maxsize,
            batches_together=sys.maxsize,
            is_streamed=True,
        )

    def parts(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Equal parts of a batch [B, L], each small enough to run at once."""
        return _equal(tokens, self.sequences_at_once)

    def graph_parts(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Equal parts of a part [b, L], each small enough to run with its graph."""
        return _equal(tokens, self.graphs_at_once)

    def stored(self, state: torch.Tensor) -> torch.Tensor:
        """A state to be kept, in the host's memory where the device's share is taken by others."""
        if self.device_bytes is None or self.held.take(state, self.device_bytes):
            return state
        self.moved_bytes += state.nbytes
        return on_host(state)

    def on_device(self, state: torch.Tensor) -> torch.Tensor:
        """A stored state, where it is computed with."""
        self.moved_bytes += state.nbytes if state.device.type != self.device.type else 0
        return state.to(self.device, non_blocking=True)

    def together(self, items: Sequence[_Item], state_bytes: int) -> Iterator[Sequence[_Item]]:
        """Consecutive items that go through the stages together.

        Args:
            items: one forward each.
            state_bytes: of one forward between two stages.
        """
        count = max(1, min(self.most_together, self.walk_bytes // max(1, state_bytes)))
        for first in range(0, len(items), count):
            yield items[first : first + count]

    def waves(
        self, batches: Sequence[int], states_bytes: int, *, ranks: int = 1
    ) -> Iterator[Sequence[int]]:
        """Consecutive batches that go through the stages together.

        Args:
            batches: of a split.
            states_bytes: of all forwards of one batch between two stages.
            ranks: processes that share them.
        """
        fitting = self.walk_bytes // max(1, states_bytes)
        count = ranks * max(1, min(self.batches_together, fitting))
        for first in range(0, len(batches), count):
            yield batches[first : first + count]

    def limit(
        self,
        weights_bytes: int,
        activations: int,
        forward_bytes: int,
        graph_bytes: int | None,
    ) -> None:
        """Keep later forwards on a GPU within bounds.

        Args:
            weights_bytes: of the weights on the device.
            activations: bytes that a stage may take beside them: the same wherever the weights are,
                since the number of sequences decides the shapes of products.
            forward_bytes: most that a stage takes for one sequence.
            graph_bytes: the same with what its backward pass needs; None where it has none.
        """
        self.sequences_at_once = max(1, activations // forward_bytes)
        self.graphs_at_once = 1 if graph_bytes is None else max(1, activations // graph_bytes)
        self.device_bytes = state_bytes(weights_bytes) + self.spare_bytes
        if not self.is_streamed:
            self.walk_bytes = self.device_bytes
        else:
            self.walk_bytes = max(self.walk_bytes, self.device_bytes)


def _equal(tokens: torch.Tensor, at_once: int | None) -> tuple[torch.Tensor, ...]:
    """Parts of sequences [B, L] with at most so many each."""
    sequences = len(tokens)
    parts = math.ceil(sequences / (at_once or sequences))
    equal: tuple[torch.Tensor, ...] = tokens.split(math.ceil(sequences / parts))
    return equal
