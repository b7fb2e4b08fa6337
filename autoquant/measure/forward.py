"""Forwards that stop before the vocabulary head, and may start at any block.

Shapes: B sequences, L tokens, H hidden, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoquant.model.memory import on_host
from autoquant.model.products import CpuProducts
from autoquant.model.waiting import waits

ACTIVATION_SHARE = 1 / 16
"""What a forward may take of a GPU's memory beside the weights, in shares of theirs."""
STATE_SHARE = 1 / 50
"""What the states that are kept for later may take; more of them wait in the host's memory."""
ACTIVATION_BYTES, STATE_BYTES = 1 << 29, 1 << 28
"""What both may take in any case: beside a small model's weights, shares of theirs are nothing."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One forward's states between blocks, from which others may go on."""

    boundaries: tuple[tuple[torch.Tensor, ...], ...]
    """Input of each block for each part of the batch, [b, L, H], on the device or the host."""
    hidden: torch.Tensor
    """Final hidden states as the head reads them, [B, L, H]."""

    @property
    def bytes(self) -> int:
        states = (self.hidden, *(state for part in self.boundaries for state in part))
        return sum(t.numel() * t.element_size() for t in states)


@dataclass(frozen=True, slots=True)
class _Call:
    """What a block was called with besides its state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Trunk:
    """The model without its vocabulary head.

    A block is skipped by returning its input; the first block that runs reads the state that it
    had in a recorded forward. This works for every decoder that passes hidden states from block
    to block as the first argument, whatever else its blocks are given.

    Every product inside goes by `products`.

    A batch too large for one forward goes through each block in parts, one after the other, so that
    a weight is fake-quantized once for all of them.
    """

    def __init__(self, model: Any, products: CpuProducts) -> None:
        self.model = model
        self.products = products
        self.blocks = _decoder_blocks(model)
        self.head: Any = model.get_output_embeddings()
        self.can_resume = bool(self.blocks)
        """Whether `trace` may start behind the first block; see `check_resuming`."""
        self.sequences_at_once: int | None = None
        """How many sequences run through the blocks together; see `limit_memory`."""
        self.state_bytes: int | None = None
        """Memory on the device for states between blocks; None is no limit."""
        self._start = 0
        self._boundaries: list[torch.Tensor] = []
        self._keep = True
        self._recompute = False
        self._calls: list[_Call] | None = None
        self._first_state: torch.Tensor | None = None
        self._last_state: torch.Tensor | None = None
        self._returns_tuple = [False] * len(self.blocks)
        self._forwards = [block.forward for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.forward = self._wrapped(index, block.forward)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Final hidden states [B, L, H] of tokens [B, L], as the head reads them."""
        return self.trace(tokens, keep=False).hidden

    @torch.inference_mode()
    def trace(
        self,
        tokens: torch.Tensor,
        *,
        start: int = 0,
        after: Trace | None = None,
        keep: bool = True,
    ) -> Trace:
        """Run the blocks from `start` on; the earlier ones are taken from `after`.

        Args:
            tokens: int64 [B, L], on the model's device.
            start: first block to run; with the number of blocks none runs.
            after: a forward of the same tokens that agrees with this one before `start`.
            keep: whether to record the states between blocks, [B, L, H] each; without them
                nothing can go on from the trace.
        """
        if not self.can_resume:
            after = None
        if after is not None and start >= len(self.blocks):
            return after
        waits.adapt()
        with self.products.active():
            return self._trace(tokens, start if after is not None else 0, after, keep)

    def _trace(self, tokens: torch.Tensor, start: int, after: Trace | None, keep: bool) -> Trace:
        parts = self.parts(tokens)
        if len(parts) > 1 and self.can_resume:
            return self._trace_in_step(parts, start, after, keep)
        boundaries, hidden = [], []
        for part in parts:
            self._start, self._keep = start, keep
            self._boundaries = [*after.boundaries[0][: start + 1]] if after is not None else []
            hidden.append(self._run(part))
            boundaries.append(tuple(self._boundaries))
        self._boundaries = []
        return Trace(tuple(boundaries), hidden[0] if len(hidden) == 1 else torch.cat(hidden))

    def _trace_in_step(
        self, parts: Sequence[torch.Tensor], start: int, after: Trace | None, keep: bool
    ) -> Trace:
        """Run all parts through each block before the next."""
        kept = len(self.blocks) * len(parts)
        boundaries = [
            [*after.boundaries[number][: start + 1]] if after is not None else []
            for number in range(len(parts))
        ]
        calls: list[list[_Call]] = []
        states: list[torch.Tensor] = []
        for index in range(start, len(self.blocks)):
            for number, part in enumerate(parts):
                if index == start:
                    state, recorded = self._calls_of(part)
                    calls.append(recorded)
                    if after is not None:
                        state = boundaries[number][start].to(part.device, non_blocking=True)
                    states.append(state)
                if keep and index == len(boundaries[number]):
                    boundaries[number].append(self.stored(states[number], kept))
                call = calls[number][index]
                result = self._forwards[index](states[number], *call.args, **call.kwargs)
                states[number] = result[0] if isinstance(result, tuple) else result
        hidden = [self._finished(part, state) for part, state in zip(parts, states, strict=True)]
        return Trace(tuple(map(tuple, boundaries)), torch.cat(hidden))

    def _calls_of(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[_Call]]:
        """The state as it enters the first block, and what every block is called with."""
        self._start, self._boundaries, self._calls = len(self.blocks), [], []
        try:
            self._run(tokens)
            assert self._first_state is not None
            return self._first_state, self._calls
        finally:
            self._first_state, self._calls = None, None

    def _finished(self, tokens: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Final hidden states after the last block's output."""
        self._start, self._boundaries, self._last_state = len(self.blocks), [], state
        try:
            return self._run(tokens)
        finally:
            self._last_state = None

    def _run(self, tokens: torch.Tensor) -> torch.Tensor:
        with self._without_head() as seen:
            self.model(input_ids=tokens, use_cache=False)
        return seen[0]

    def walk(self, sequences: Sequence[torch.Tensor]) -> "Walk":
        """Take sequences, int64 [b, L] on the model's device, through the blocks one by one."""
        return Walk(self, sequences)

    def limit_memory(self, tokens: torch.Tensor) -> None:
        """Keep later forwards on a GPU within shares of the weights' memory, small models' aside.

        Measures what one sequence takes, and lets so many run together as fit.

        Args:
            tokens: int64 [1, L], a sequence as long as those to come.
        """
        if not tokens.is_cuda:
            return
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        before = torch.cuda.memory_allocated(tokens.device)
        torch.cuda.reset_peak_memory_stats(tokens.device)
        self.hidden(tokens)
        taken = torch.cuda.max_memory_allocated(tokens.device) - before
        activations = max(ACTIVATION_BYTES, ACTIVATION_SHARE * weights)
        self.sequences_at_once = max(1, int(activations / taken))
        self.state_bytes = int(max(STATE_BYTES, STATE_SHARE * weights))

    def stored(self, state: torch.Tensor, count: int) -> torch.Tensor:
        """A state to be kept, in the host's memory if `count` of its size exceed the device's."""
        size = count * state.numel() * state.element_size()
        return state if self.state_bytes is None or size <= self.state_bytes else on_host(state)

    def parts(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Equal parts of a batch [B, L], each small enough to run at once."""
        sequences = len(tokens)
        parts = math.ceil(sequences / (self.sequences_at_once or sequences))
        equal: tuple[torch.Tensor, ...] = tokens.split(math.ceil(sequences / parts))
        return equal

    def differentiable(self, tokens: torch.Tensor) -> torch.Tensor:
        """Final hidden states [B, L, H] with their graph back to the first block.

        What happens inside a block is computed again in the backward pass, so that memory holds
        the states between blocks and the inside of one.
        """
        waits.adapt()
        self._start, self._boundaries, self._keep = 0, [], False
        self._recompute = True
        try:
            with torch.enable_grad(), self.products.active(), self._without_head() as seen:
                self.model(input_ids=tokens, use_cache=False)
        finally:
            self._recompute = False
        return seen[0]

    def check_resuming(self, tokens: torch.Tensor) -> bool:
        """Find out, bit for bit, whether later blocks need nothing but the state between blocks.

        Where blocks share more than that (keys and values of another block, the embeddings), every
        `trace` runs whole from then on.
        """
        whole = self.trace(tokens)
        try:
            self.can_resume = self.can_resume and all(
                torch.equal(self.trace(tokens, start=start, after=whole).hidden, whole.hidden)
                for start in {1, len(self.blocks) // 2, len(self.blocks) - 1}
            )
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            self.can_resume = False
        return self.can_resume

    @contextmanager
    def other_attention(self) -> Iterator[bool]:
        """Compute attention by transformers' eager code inside; False where it cannot be changed.

        Other kernels sum in another order, which is the only difference between two BF16 runs.
        """
        before, together = self.model.config._attn_implementation, self.sequences_at_once
        try:
            self.model.set_attn_implementation("eager")
        except (ValueError, ImportError):
            yield False
            return
        if together is not None:
            self.sequences_at_once = 1  # every pair of positions of every head is in memory
        try:
            yield before != "eager"
        finally:
            self.model.set_attn_implementation(before)
            self.sequences_at_once = together

    @contextmanager
    def _without_head(self) -> Iterator[list[torch.Tensor]]:
        """Catch what the head would read; the head returns it unmultiplied."""
        seen: list[torch.Tensor] = []

        def catch(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden)
            return hidden

        forward = self.head.forward
        self.head.forward = catch
        try:
            yield seen
        finally:
            self.head.forward = forward

    def _wrapped(self, index: int, forward: Any) -> Any:
        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if index < self._start:
                if self._calls is not None:
                    self._first_state = hidden_states
                    self._calls.append(_Call(args, kwargs))
                if self._last_state is not None and index == len(self.blocks) - 1:
                    hidden_states = self._last_state
                return (hidden_states,) if self._returns_tuple[index] else hidden_states
            if index < len(self._boundaries):
                state = self._boundaries[index]
                hidden_states = state.to(hidden_states.device, non_blocking=True)
            elif self._keep:
                self._boundaries.append(self.stored(hidden_states, len(self.blocks)))
            if self._recompute:
                states = hidden_states if index else hidden_states.detach().requires_grad_()
                return checkpoint(
                    forward,
                    states,
                    *args,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=lambda: (nullcontext(), self.products.active()),
                    **kwargs,
                )
            result = forward(hidden_states, *args, **kwargs)
            self._returns_tuple[index] = isinstance(result, tuple)
            return result

        return run


class Walk:
    """Sequences on their way through the blocks: all of them through one before the next.

    Where the trunk cannot resume, every step runs the whole model.

    Args:
        trunk: the model.
        sequences: int64 [b, L] each.
    """

    def __init__(self, trunk: Trunk, sequences: Sequence[torch.Tensor]) -> None:
        self._trunk = trunk
        self._sequences = sequences
        self._calls: list[list[_Call]] = []
        self._states: list[torch.Tensor] = []
        if trunk.can_resume:
            with torch.inference_mode(), trunk.products.active():
                for sequence in sequences:
                    state, calls = trunk._calls_of(sequence)
                    self._states.append(trunk.stored(state, len(sequences)))
                    self._calls.append(calls)

    @torch.inference_mode()
    def through(self, block: int, number: int) -> None:
        """Run a block on a sequence that has been through all blocks before it."""
        trunk, tokens = self._trunk, self._sequences[number]
        if not trunk.can_resume:
            trunk.hidden(tokens)
            return
        call = self._calls[number][block]
        state = self._states[number].to(tokens.device, non_blocking=True)
        with trunk.products.active():
            result = trunk._forwards[block](state, *call.args, **call.kwargs)
        state = result[0] if isinstance(result, tuple) else result
        self._states[number] = trunk.stored(state, len(self._sequences))

    @torch.inference_mode()
    def hidden(self, number: int) -> torch.Tensor:
        """Final hidden states [b, L, H] of a sequence that has been through all blocks."""
        trunk, tokens = self._trunk, self._sequences[number]
        if not trunk.can_resume:
            return trunk.hidden(tokens)
        with trunk.products.active():
            return trunk._finished(tokens, self._states[number].to(tokens.device))


def _decoder_blocks(model: Any) -> list[Any]:
    """The blocks of the text decoder: the list whose length the configuration names."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and count > 0:
            return list(module)
    return []
