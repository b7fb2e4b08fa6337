"""Gradients from the final hidden states back to every product, block by block in reverse.

A forward leaves the states between stages. Each stage is computed again from its state, with a
graph that ends there, and hands the gradient at its input to the stage before it. So memory holds
the states and the inside of one stage, and the weights are passed once more.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from autoquant.forward.flow import Flow
from autoquant.forward.room import Room
from autoquant.forward.trunk import Trunk


class Backward:
    """The visitor that takes a batch's gradients back through each stage.

    Args:
        trunk: the model, all groups in BF16.
        room: where the flow's states are.
        flow: of the BF16 model, at its end, with its states kept.
        tapped: for each part of the batch, what receives the gradients of products inside a `with`
            block of it.
        pull: the gradient at a part's final hidden states [b, L, H] that all begins with.
    """

    def __init__(
        self,
        trunk: Trunk,
        room: Room,
        flow: Flow,
        tapped: Sequence[Callable[[], AbstractContextManager[None]]],
        pull: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._trunk, self._room, self._flow, self._tapped = trunk, room, flow, tapped
        self._gradients = [
            self._of_finish(number, hidden, pull) for number, hidden in enumerate(flow.finals)
        ]

    def visit(self, stage: int) -> None:
        """Compute the stage again, and its gradients."""
        states = self._flow.boundaries.pop()
        for number, (part, state) in enumerate(zip(self._flow.parts, states, strict=True)):
            leaf = _leaf(self._room.on_device(state))
            with self._tapped[number](), torch.enable_grad():
                after = self._trunk.advance(stage, part, leaf)
                after.backward(self._room.on_device(self._gradients[number]))
            if leaf.grad is not None:
                self._gradients[number] = self._room.stored(leaf.grad, len(states))

    def _of_finish(
        self, number: int, final: torch.Tensor, pull: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The gradient at the last stage's output."""
        leaf = _leaf(self._room.on_device(final))
        with torch.enable_grad():
            hidden = self._trunk.finish(self._flow.parts[number], leaf)
        gradient = pull(hidden.detach())
        if hidden is leaf:
            return gradient
        hidden.backward(gradient)
        assert leaf.grad is not None
        return leaf.grad


def _leaf(state: torch.Tensor) -> torch.Tensor:
    """The start of a graph; tokens, which the only stage of some models reads, have no gradient."""
    own = state.detach()
    return own.requires_grad_() if own.is_floating_point() else own
