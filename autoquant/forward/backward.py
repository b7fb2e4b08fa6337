"""Gradients from the final hidden states back to every product, block by block in reverse.

A forward leaves the states between stages. Each stage is computed again from its state, with a
graph that ends there, and hands the gradient at its input to the stage before it. So memory holds
the states and the inside of one stage, and the weights are passed once more.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from autoquant.forward.attention_order import attention_in_one_order
from autoquant.forward.flow import Flow
from autoquant.forward.room import Room
from autoquant.forward.trunk import Part, Trunk

Tapped = Callable[[], AbstractContextManager[None]]
"""What receives the gradients of products inside a `with` block of it."""


class Backward:
    """The visitor that takes a batch's gradients back through each stage.

    Args:
        trunk: the model, all groups in BF16.
        room: where the flow's states are.
        flow: of the BF16 model, at its end, with its states kept.
        pieces: of each part of the flow: what goes through a stage with its graph at once.
        tapped: one for each piece.
        pull: the gradient at a part's final hidden states [b, L, H] that all begins with.
    """

    def __init__(
        self,
        trunk: Trunk,
        room: Room,
        flow: Flow,
        pieces: Sequence[Sequence[Part]],
        tapped: Sequence[Tapped],
        pull: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._trunk, self._room, self._flow = trunk, room, flow
        self._pieces, self._tapped = pieces, tapped
        self._gradients: list[torch.Tensor] = []
        for part, own, final in zip(flow.parts, pieces, flow.finals, strict=True):
            gradient = self._of_finish(part, final, pull)
            self._gradients += map(room.stored, gradient.split(_sizes(own)))
        flow.finals = ()

    def visit(self, stage: int) -> None:
        """Compute the stage again, and its gradients."""
        number = 0
        for own, states in zip(self._pieces, self._flow.boundaries.pop(), strict=True):
            for piece, state in zip(own, states.split(_sizes(own)), strict=True):
                found = back_through(
                    self._trunk,
                    stage,
                    piece,
                    self._room.on_device(state),
                    self._room.on_device(self._gradients[number]),
                    self._tapped[number],
                )
                if found is not None:
                    self._gradients[number] = self._room.stored(found)
                number += 1

    def _of_finish(
        self, part: Part, final: torch.Tensor, pull: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The gradient at the last stage's output."""
        leaf = _leaf(self._room.on_device(final))
        with torch.enable_grad():
            hidden = self._trunk.finish(part, leaf)
        gradient = pull(hidden.detach())
        if hidden is leaf:
            return gradient
        hidden.backward(gradient)
        assert leaf.grad is not None
        return leaf.grad


def back_through(
    trunk: Trunk,
    stage: int,
    part: Part,
    state: torch.Tensor,
    gradient: torch.Tensor,
    tapped: Tapped,
) -> torch.Tensor | None:
    """The gradient at a stage's input [b, L, H], None at the tokens of a model in one stage.

    Args:
        trunk: the model, the stage's weights there.
        stage: its number.
        part: of the sequences.
        state: before the stage, on the device.
        gradient: at the stage's output.
        tapped: receives the gradients of products.
    """
    leaf = _leaf(state)
    with tapped(), attention_in_one_order(leaf.device), torch.enable_grad():
        trunk.advance(stage, part, leaf).backward(gradient)
    return leaf.grad


@torch.no_grad()
def pieces_of(trunk: Trunk, room: Room, flow: Flow) -> list[tuple[Part, ...]]:
    """The parts of a flow, each in what may go through a stage with its graph at once."""
    return [_apart(trunk, room, part) for part in flow.parts]


def _apart(trunk: Trunk, room: Room, part: Part) -> tuple[Part, ...]:
    apart = room.graph_parts(part.tokens)
    if len(apart) == 1:
        return (part,)
    states = part.state.split([len(tokens) for tokens in apart])
    return tuple(
        replace(trunk.enter(tokens), state=state)
        for tokens, state in zip(apart, states, strict=True)
    )


def _sizes(parts: Sequence[Part]) -> list[int]:
    """Sequences of each."""
    return [len(part.tokens) for part in parts]


def _leaf(state: torch.Tensor) -> torch.Tensor:
    """The start of a graph; tokens, which the only stage of some models reads, have no gradient."""
    own = state.detach()
    return own.requires_grad_() if own.is_floating_point() else own
