"""A second forward of the BF16 model that differs from the first in its last digits alone."""

import torch

from autoquant.forward.flow import Flow, entered
from autoquant.forward.room import Room
from autoquant.forward.trunk import Trunk


@torch.no_grad()
def second_forward(trunk: Trunk, room: Room, tokens: torch.Tensor) -> Flow:
    """The forward with attention of other kernels, or, where the architecture has only one, of a
    sequence at a time.

    Args:
        trunk: the model.
        room: bounds of its forwards.
        tokens: int64 [B, L], on the device.
    """
    before = room.sequences_at_once
    with trunk.other_attention() as is_other:
        if before is not None or not is_other:  # every pair of positions is in memory
            room.sequences_at_once = 1
        try:
            parts = entered(trunk, room, room.parts(tokens))
        finally:
            room.sequences_at_once = before
    return Flow(parts=parts, inside=trunk.other_attention)
