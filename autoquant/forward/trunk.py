"""A live model cut into stages: what comes before the first block, each block, what comes after.

A forward enters, advances stage by stage, and finishes before the vocabulary head. Whoever drives
it decides what else passes a stage before the next one, and which weights are there meanwhile.

Shapes: b sequences, L tokens, H hidden.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from autoquant.codes.weights import WeightSource
from autoquant.model.products import CpuProducts
from autoquant.model.streaming.blocks import decoder_blocks

_ATTENTION = "_attn_implementation"
"""Of a configuration: what computes attention; set for a whole, it is set for all of its parts."""


class Visitor(Protocol):
    """Does something with each stage while its weights are there."""

    def visit(self, stage: int) -> None:
        """Called once for every stage, in the order of the walk."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What a block is called with besides its state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences that go through the stages together, as they enter the first."""

    tokens: torch.Tensor
    """int64 [b, L]."""
    state: torch.Tensor
    """What the first stage reads, [b, L, H]; of a model in one stage its tokens."""
    calls: tuple[_Call, ...]
    """One for each block."""


_OnBlock = Callable[[int, torch.Tensor, tuple[Any, ...], dict[str, Any]], Any]
"""Stands in for a block: takes its index, its state and its other arguments."""


class Trunk:
    """The model without its vocabulary head.

    A stage is a block of the decoder. This serves every decoder that passes hidden states from
    block to block as the first argument, whatever else its blocks are given. Where blocks share
    more than that (keys and values of another block), the whole model is one stage.

    Every product inside goes by `products`.

    Args:
        model: a transformers causal language model.
        products: how its products are computed.
        weights: gives the weights of each block.
    """

    def __init__(self, model: Any, products: CpuProducts, weights: WeightSource) -> None:
        self.model = model
        self.products = products
        self.weights = weights
        self.blocks = decoder_blocks(model)
        self.head: Any = model.get_output_embeddings()
        self.is_whole = not self.blocks
        """Whether the model is one stage."""
        self.changes_logits = False
        """Whether the model scales or caps what its head gives; see `behind_head`."""
        self._on_block: _OnBlock | None = None
        self._riding: tuple[Visitor, ...] = ()
        self.opened = 0
        """Stages whose weights were asked for so far."""
        self.returns_tuple = [False] * len(self.blocks)
        """Whether a block returns its state in a tuple, as far as it has run."""
        self._forwards = [block.forward for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.forward = self._wrapped(index)

    @property
    def stages(self) -> int:
        return 1 if self.is_whole else len(self.blocks)

    def stage_of(self, layer: int | None) -> int:
        """First stage to run when a group of this layer changes; behind all stages for a head."""
        if layer is None:
            return self.stages
        return 0 if self.is_whole else layer

    def state_bytes(self, tokens: int) -> int:
        """Of the states of so many tokens between two stages."""
        weight = self.head.weight
        return int(tokens * weight.shape[1] * weight.element_size())

    def open(self, stage: int) -> AbstractContextManager[object]:
        """The weights of a stage for the time of a `with` block; one stage opens its blocks."""
        self.opened += 1
        return nullcontext() if self.is_whole else self.weights.block(stage)

    def enter(self, tokens: torch.Tensor) -> Part:
        """Tokens int64 [b, L] on the model's device, as they enter the first stage."""
        if self.is_whole:
            return Part(tokens, tokens, ())
        states: list[torch.Tensor] = []
        calls: list[_Call] = []

        def record(_: int, state: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
            states.append(state)
            calls.append(_Call(args, kwargs))
            return state

        with self._standing_in(record):
            self._hidden(tokens)
        return Part(tokens, states[0], tuple(calls))

    def advance(self, stage: int, part: Part, state: torch.Tensor) -> torch.Tensor:
        """The state behind a stage, [b, L, H], of the state before it; its weights are there."""
        if self.is_whole:
            return self._hidden(part.tokens)
        call = part.calls[stage]
        with self.products.active():
            return self._state_of(stage, self._forwards[stage](state, *call.args, **call.kwargs))

    def finish(self, part: Part, state: torch.Tensor) -> torch.Tensor:
        """Final hidden states [b, L, H], as the head reads them, of the state behind all stages."""
        if self.is_whole:
            return state
        last = len(self.blocks) - 1
        with self._standing_in(lambda index, own, *_: state if index == last else own):
            return self._hidden(part.tokens)

    def logits(self, tokens: torch.Tensor, riding: Iterable[Visitor] = ()) -> torch.Tensor:
        """Logits [b, L, V] of the model's own forward of tokens [b, L].

        Args:
            tokens: int64, on the model's device.
            riding: visit each block while its weights are there for that forward.
        """
        self._riding = tuple(riding)
        try:
            with self.products.active():
                logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            self._riding = ()
        return logits

    def behind_head(self, output: torch.Tensor) -> torch.Tensor:
        """What the model makes of its head's output [T, V]: the steps of its forward behind it.

        Those steps are the model's own code, run for one token without a block. They take each
        token's logits by themselves, so that those of any number can go through them.
        """
        token = torch.zeros((1, 1), dtype=torch.long, device=output.device)
        with (
            self._standing_in(lambda _, state, *__: state),
            self._head_forward(lambda _: output[None]),
        ):
            logits: torch.Tensor = self.model(input_ids=token, use_cache=False).logits
        return logits[0]

    @contextmanager
    def other_attention(self) -> Iterator[bool]:
        """Compute attention by transformers' eager code inside; False where it cannot be changed.

        Other kernels sum in another order, which is the only difference between two BF16 runs.
        """
        is_other = self.model.config.get_text_config()._attn_implementation != "eager"
        parts = [part for part in self.model.modules() if hasattr(part, "config")]
        configs = {id(part.config): part.config for part in parts}.values()  # the whole's first
        before = [(config, getattr(config, _ATTENTION, None)) for config in configs]
        try:
            self.model.set_attn_implementation("eager")
        except (ValueError, ImportError):
            yield False
            return
        try:
            yield is_other
        finally:
            for config, own in before:  # a part of the model may have another than the whole
                if own is not None:
                    setattr(config, _ATTENTION, own)

    def _hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the head would read in a forward of the model; the head returns it unmultiplied."""
        seen: list[torch.Tensor] = []

        def catch(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden)
            return hidden

        with self._head_forward(catch), self.products.active():
            self.model(input_ids=tokens, use_cache=False)
        return seen[0]

    @contextmanager
    def _head_forward(self, replacement: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Another forward of the head inside."""
        forward = self.head.forward
        self.head.forward = replacement
        try:
            yield
        finally:
            self.head.forward = forward

    @contextmanager
    def _standing_in(self, on_block: _OnBlock) -> Iterator[None]:
        """Let `on_block` stand in for every block inside."""
        self._on_block = on_block
        try:
            yield
        finally:
            self._on_block = None

    def _wrapped(self, index: int) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._on_block is not None:
                state = self._on_block(index, hidden_states, args, kwargs)
                return (state,) if self.returns_tuple[index] else state
            if torch.is_grad_enabled():
                return self._recomputed(index, hidden_states, args, kwargs)
            return self._own(index, hidden_states, args, kwargs)

        return forward

    def _own(
        self, index: int, state: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The block in the model's own forward."""
        self.opened += not self.is_whole
        with self.weights.block(index):
            for visitor in self._riding:
                visitor.visit(index)
            result = self._forwards[index](state, *args, **kwargs)
            self._state_of(index, result)
            return result

    def _recomputed(
        self, index: int, state: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The block, computed again in the backward pass, which ends at the first block's state."""
        return checkpoint(
            self._own,
            index,
            state if index else state.detach().requires_grad_(),
            args,
            kwargs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), self.products.active()),
        )

    def _state_of(self, index: int, result: Any) -> torch.Tensor:
        self.returns_tuple[index] = isinstance(result, tuple)
        state: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return state
