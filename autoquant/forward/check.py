"""Whether block by block gives what the model's own forward gives, and what that takes of a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from autoquant.errors import SourceError, first_line
from autoquant.forward.backward import back_through
from autoquant.forward.flow import Flow, Flows, loop, walk
from autoquant.forward.room import Room
from autoquant.forward.taps import Taps
from autoquant.forward.trunk import Trunk
from autoquant.model.live import QuantizedModel
from autoquant.model.memory import DeviceMemory
from autoquant.model.streaming.work import activation_bytes

NOT_BLOCK_BY_BLOCK = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What model code raises whose blocks need more than the state between them."""
_COMPARED_TOKENS = 128
"""Whose logits are compared at a time."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Most that one sequence takes of a GPU in a stage, beside the weights."""

    forward: int
    """Bytes."""
    graph: int | None
    """The same with what its backward pass needs, and a forward of what is tried there; None where
    the model has no such pass."""


@torch.inference_mode()
def check_forward(
    trunk: Trunk,
    quantized: QuantizedModel,
    room: Room,
    tokens: torch.Tensor,
    memory: DeviceMemory | None = None,
) -> Taken | None:
    """Hold the walk through the blocks against the model's own forward, bit for bit.

    A model whose blocks share more than the state between them becomes one stage.

    Args:
        trunk: of the model.
        quantized: all groups in BF16.
        room: where states are kept.
        tokens: int64 [1, L].
        memory: of the device, where what these tokens take of it is to be measured on the way.

    Returns:
        That, if measured.

    Raises:
        SourceError: the model's own forward fails or gives NaN, or its logits are not the head
            applied to the final hidden states, scaled or capped token by token.
    """
    measured = _measured(trunk, quantized, room, tokens, memory)
    if not trunk.is_whole and (
        _passes_block_by_block(trunk, quantized, room, tokens, measured)
        or (
            _some_return_tuples(trunk, tokens)
            and _passes_block_by_block(trunk, quantized, room, tokens, measured)
        )
    ):
        return measured[0].taken if measured else None
    trunk.is_whole = True
    logits = _own_logits(trunk, tokens)
    flow = Flow(parts=(trunk.enter(tokens),))
    walk(trunk, quantized, room, [flow])
    if logits.isnan().any():
        raise SourceError(
            f"the logits of {type(trunk.model).__name__} in BF16 hold NaN, so that nothing has a "
            "KL to them.",
            fix="repair or download the model again; one whose BF16 forward overflows cannot be "
            "searched.",
        )
    if not _is_output(trunk, flow.hidden, logits):
        raise SourceError(
            f"{type(trunk.model).__name__} does more to its logits behind the head than to scale "
            "or cap them, which scoring from hidden states would miss.",
            fix="this architecture is not supported yet.",
        )
    return None if memory is None else measure_stages(trunk, quantized, room, tokens, memory)


def check_and_limit(
    trunk: Trunk, quantized: QuantizedModel, room: Room, tokens: torch.Tensor
) -> None:
    """The same check; on a GPU it also keeps later forwards within bounds.

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
        weights = sum(own.nbytes for own in trunk.model.parameters() if own.is_cuda)
        room.limit(weights, activations_of(trunk), taken.forward, taken.graph)


def activations_of(trunk: Trunk) -> int:
    """Bytes that a stage of a model may take of a GPU, wherever its weights are."""
    blocks = [[*block.parameters()] for block in trunk.blocks]
    inside = {id(own) for block in blocks for own in block}
    weights = [*trunk.model.parameters()]
    return activation_bytes(
        outside=sum(own.nbytes for own in weights if id(own) not in inside),
        largest_block=max((sum(own.nbytes for own in block) for block in blocks), default=0),
        all_weights=sum(own.nbytes for own in weights),
    )


@torch.no_grad()
def measure_stages(
    trunk: Trunk,
    quantized: QuantizedModel,
    room: Room,
    tokens: torch.Tensor,
    memory: DeviceMemory,
) -> Taken:
    """Most that these tokens take of the device in a stage beside the weights.

    Weights that arrive while a block computes do not count: each block waits until they are there.
    """
    (visitor,) = _measured(trunk, quantized, room, tokens, memory)
    loop(trunk, [visitor])
    return visitor.taken


def _measured(
    trunk: Trunk,
    quantized: QuantizedModel,
    room: Room,
    tokens: torch.Tensor,
    memory: DeviceMemory | None,
) -> list["_Measured"]:
    """A forward that is measured, where something measures."""
    if memory is None:
        return []
    with torch.inference_mode(False), torch.no_grad():  # a graph is made of it
        flow = Flow(parts=(trunk.enter(tokens),), keep=True)
    taps = Taps.watching(quantized, tokens.numel())
    return [_Measured(Flows(trunk, quantized, room, [flow]), flow, taps, memory)]


@dataclass(slots=True)
class _Measured:
    """The visitor that takes a sequence through each stage, and measures what that takes."""

    flows: Flows
    flow: Flow
    """The only one."""
    taps: Taps
    """Keep of the products what gradients need."""
    memory: DeviceMemory
    forward: int = 0
    graph: int = 0
    has_graph: bool = True

    @property
    def taken(self) -> Taken:
        """Of the stage that takes most."""
        graph = self.graph + self.forward if self.has_graph else None
        return Taken(self.forward, graph)

    def visit(self, stage: int) -> None:
        self.flows.quantized.settle()
        self.forward = max(self.forward, self._of(lambda: self.flows.visit(stage)))
        (before,), (after,) = self.flow.boundaries.pop(), self.flow.states
        if self.has_graph:
            with torch.inference_mode(False):
                state, gradient = before.clone(), torch.zeros_like(after)
                try:
                    taken = self._of(lambda: self._back(stage, state, gradient))
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # model code and custom kernels without a backward pass
                    self.has_graph = False
                else:
                    self.graph = max(self.graph, taken)

    def _back(self, stage: int, state: torch.Tensor, gradient: torch.Tensor) -> None:
        (part,) = self.flow.parts
        back_through(self.flows.trunk, stage, part, state, gradient, self.taps.installed)

    def _of(self, run: Callable[[], object]) -> int:
        before = self.memory.begin()
        run()
        return self.memory.peak() - before


def _own_logits(trunk: Trunk, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [1, L, V] of the model's own forward.

    Raises:
        SourceError: it fails, whatever runs beside it.
    """
    try:
        return trunk.logits(tokens)
    except torch.OutOfMemoryError:
        raise
    except NOT_BLOCK_BY_BLOCK as error:
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
    except NOT_BLOCK_BY_BLOCK:
        return False
    is_same = all(torch.equal(flow.hidden, whole.hidden) for flow in later)
    return is_same and _is_output(trunk, whole.hidden, logits)


def _is_output(trunk: Trunk, hidden: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether the head gives a model's logits; notes in the trunk what has to happen behind it."""
    with trunk.products.active():
        output = trunk.head(hidden)
    trunk.changes_logits = not _is_same(logits[0], output[0])
    if not trunk.changes_logits:
        return True
    apart = output[0].split(max(1, output.shape[1] // 2))  # no token's logits depend on others'
    found = torch.cat([trunk.behind_head(tokens) for tokens in apart])
    return _is_same(logits[0], found)


def _is_same(logits: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether logits [L, V] are equal in float32, which few of them are in at a time."""
    tiles = zip(logits.split(_COMPARED_TOKENS), others.split(_COMPARED_TOKENS), strict=True)
    return all(torch.equal(one.float(), other.float()) for one, other in tiles)
