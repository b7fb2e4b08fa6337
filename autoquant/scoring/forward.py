"""Forwards that stop before the vocabulary head, and may start at any block.

Shapes: B sequences, L tokens, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, slots=True)
class Trace:
    """One forward's states between blocks, from which others may go on."""

    boundaries: tuple[torch.Tensor, ...]
    """Input of each block, [B, L, H]."""
    hidden: torch.Tensor
    """Final hidden states as the head reads them, [B, L, H]."""

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.boundaries, self.hidden))


class Trunk:
    """The model without its vocabulary head.

    A block is skipped by returning its input; the first block that runs reads the state that it
    had in a recorded forward. This works for every decoder that passes hidden states from block
    to block as the first argument, whatever else its blocks are given.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = _decoder_blocks(model)
        self.head: Any = model.get_output_embeddings()
        self.can_resume = bool(self.blocks)
        """Whether `trace` may start behind the first block; see `check_resuming`."""
        self._start = 0
        self._boundaries: list[torch.Tensor] = []
        self._keep = True
        self._recompute = False
        self._returns_tuple = [False] * len(self.blocks)
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
        self._start = start if after is not None else 0
        self._boundaries = [*after.boundaries[: self._start + 1]] if after is not None else []
        self._keep = keep
        with self._without_head() as seen:
            self.model(input_ids=tokens, use_cache=False)
        boundaries, self._boundaries = tuple(self._boundaries), []
        return Trace(boundaries, seen[0])

    def differentiable(self, tokens: torch.Tensor) -> torch.Tensor:
        """Final hidden states [B, L, H] with their graph back to the first block.

        What happens inside a block is computed again in the backward pass, so that memory holds
        the states between blocks and the inside of one.
        """
        self._start, self._boundaries, self._keep = 0, [], False
        self._recompute = True
        try:
            with torch.enable_grad(), self._without_head() as seen:
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
        before = self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation("eager")
        except (ValueError, ImportError):
            yield False
            return
        try:
            yield before != "eager"
        finally:
            self.model.set_attn_implementation(before)

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
                return (hidden_states,) if self._returns_tuple[index] else hidden_states
            if index < len(self._boundaries):
                hidden_states = self._boundaries[index]
            elif self._keep:
                self._boundaries.append(hidden_states)
            if self._recompute:
                states = hidden_states if index else hidden_states.detach().requires_grad_()
                return checkpoint(
                    forward, states, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
                )
            result = forward(hidden_states, *args, **kwargs)
            self._returns_tuple[index] = isinstance(result, tuple)
            return result

        return run


def _decoder_blocks(model: Any) -> list[Any]:
    """The blocks of the text decoder: the list whose length the configuration names."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and count > 0:
            return list(module)
    return []
