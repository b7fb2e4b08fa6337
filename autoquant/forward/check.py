"""Whether block by block gives what the model's own forward gives, and what that takes of a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autoquant.errors import SourceError, first_line
from autoquant.forward.flow import Flow, Flows, loop, walk
from autoquant.forward.room import Room
from autoquant.forward.trunk import Trunk
from autoquant.model.live import QuantizedModel
from autoquant.model.memory import DeviceMemory

_NOT_BLOCK_BY_BLOCK = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What model code raises whose blocks need more than the state between them."""


@torch.inference_mode()
def check_forward(
    trunk: Trunk,
    quantized: QuantizedModel,
    room: Room,
    tokens: torch.Tensor,
    memory: DeviceMemory | None = None,
) -> int | None:
    """Hold the walk through the blocks against the model's own forward, bit for bit.

    A model whose blocks share more than the state between them becomes one stage.

    Args:
        trunk: of the model.
        quantized: all groups in BF16.
        room: where states are kept.
        tokens: int64 [1, L].
        memory: of the device, where what a forward takes of it is to be measured on the way.

    Returns:
        Bytes that a forward of these tokens takes of the device beside the weights, if measured.

    Raises:
        SourceError: the model's own forward fails, or its logits are not the head applied to the
            final hidden states, scaled or capped token by token.
    """
    measured = _measured_flows(trunk, quantized, room, tokens, memory)
    if not trunk.is_whole and (
        _passes_block_by_block(trunk, quantized, room, tokens, measured)
        or (
            _some_return_tuples(trunk, tokens)
            and _passes_block_by_block(trunk, quantized, room, tokens, measured)
        )
    ):
        return max(visitor.taken for visitor in measured) if measured else None
    trunk.is_whole = True
    logits = _own_logits(trunk, tokens)
    flow = Flow(parts=(trunk.enter(tokens),))
    walk(trunk, quantized, room, [flow])
    if not _is_output(trunk, flow.hidden, logits):
        raise SourceError(
            f"{type(trunk.model).__name__} does more to its logits behind the head than to scale "
            "or cap them, which scoring from hidden states would miss.",
            fix="this architecture is not supported yet.",
        )
    if memory is None:
        return None
    return activation_bytes(trunk, quantized, room, tokens, memory)


def check_and_limit(
    trunk: Trunk, quantized: QuantizedModel, room: Room, tokens: torch.Tensor
) -> None:
    """The same check; on a GPU it also keeps later forwards within shares of the weights.

    Args:
        trunk: of the model.
        quantized: all groups in BF16.
        room: where states are kept; is limited.
        tokens: int64 [1, L], a sequence as long as those to come.

    Raises:
        SourceError: as `check_forward`.
    """
    memory = DeviceMemory(tokens.device) if tokens.is_cuda else None
    taken = check_forward(trunk, quantized, room, tokens, memory)
    if taken is not None:
        weights = sum(p.numel() * p.element_size() for p in trunk.model.parameters() if p.is_cuda)
        room.limit(weights, taken)


@torch.no_grad()
def activation_bytes(
    trunk: Trunk,
    quantized: QuantizedModel,
    room: Room,
    tokens: torch.Tensor,
    memory: DeviceMemory,
) -> int:
    """Most that a forward of these tokens takes of the device beside the weights.

    Weights that arrive while a block computes do not count: each block waits until they are there.
    """
    (visitor,) = _measured_flows(trunk, quantized, room, tokens, memory)
    loop(trunk, [visitor])
    return visitor.taken


def _measured_flows(
    trunk: Trunk,
    quantized: QuantizedModel,
    room: Room,
    tokens: torch.Tensor,
    memory: DeviceMemory | None,
) -> list["_Measured"]:
    """A forward that is measured, where there is a memory to measure."""
    if memory is None:
        return []
    flows = Flows(trunk, quantized, room, [Flow(parts=(trunk.enter(tokens),))])
    return [_Measured(flows, quantized, memory)]


@dataclass(slots=True)
class _Measured:
    """The visitor that takes forwards through each stage, and measures what that takes."""

    flows: Flows
    quantized: QuantizedModel
    memory: DeviceMemory
    taken: int = 0
    """Bytes, of the stage that takes most."""

    def visit(self, stage: int) -> None:
        self.quantized.settle()
        before = self.memory.begin()
        self.flows.visit(stage)
        self.taken = max(self.taken, self.memory.peak() - before)


def _own_logits(trunk: Trunk, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [1, L, V] of the model's own forward.

    Raises:
        SourceError: it fails, whatever runs beside it.
    """
    try:
        return trunk.logits(tokens)
    except torch.OutOfMemoryError:
        raise
    except _NOT_BLOCK_BY_BLOCK as error:
        raise SourceError(
            f"transformers' own forward of {type(trunk.model).__name__} fails in BF16 on a "
            f"sequence of {tokens.shape[1]} tokens: {first_line(error)}",
            fix="use a version of transformers that runs this model, or sequences of another "
            "--sequence-length.",
        ) from error


def _some_return_tuples(trunk: Trunk, tokens: torch.Tensor) -> bool:
    """Whether a block returns its state in a tuple, which the trunk learns when the model runs."""
    _own_logits(trunk, tokens)
    return any(trunk.returns_tuple)


def _passes_block_by_block(
    trunk: Trunk,
    quantized: QuantizedModel,
    room: Room,
    tokens: torch.Tensor,
    measured: Sequence[_Measured],
) -> bool:
    """One pass with the model's own forward: a forward of these tokens, others that start at later
    blocks with its states, and one of other tokens in between.

    What is measured comes behind them, when libraries have taken what they keep.
    """
    try:
        whole = Flow(parts=(trunk.enter(tokens),))
        other = Flow(parts=(trunk.enter(tokens.flip(1)),))
        later = [
            Flow(parts=whole.parts, start=start, after=whole)
            for start in sorted({1, trunk.stages // 2, trunk.stages - 1})
            if start
        ]
        flows = Flows(trunk, quantized, room, [whole, other, *later])
        logits = trunk.logits(tokens, riding=[flows, *measured])
        flows.finish()
    except _NOT_BLOCK_BY_BLOCK:
        return False
    is_same = all(torch.equal(flow.hidden, whole.hidden) for flow in later)
    return is_same and _is_output(trunk, whole.hidden, logits)


def _is_output(trunk: Trunk, hidden: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether the head gives a model's logits; notes in the trunk what has to happen behind it."""
    with trunk.products.active():
        output = trunk.head(hidden)
    trunk.changes_logits = not torch.equal(logits.float(), output.float())
    if not trunk.changes_logits:
        return True
    apart = output[0].split(max(1, output.shape[1] // 2))  # no token's logits depend on others'
    found = torch.cat([trunk.behind_head(tokens) for tokens in apart])
    return torch.equal(logits[0].float(), found.float())
