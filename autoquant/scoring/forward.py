"""Forwards that stop before the vocabulary head, and may start at any block.

Shapes: B sequences, L tokens, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Boundaries = list[torch.Tensor]
"""Input of each block in BF16, [B, L, H] each."""


class Trunk:
    """The model without its vocabulary head.

    A block is skipped by returning its input; the first block that runs reads the state that it
    had in a recorded forward. This works for every decoder that passes hidden states from block
    to block as the first argument, whatever else its blocks are given.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = _decoder_blocks(model)
        self.head: nn.Linear = model.get_output_embeddings()
        self._start = 0
        self._boundaries: Boundaries = []
        self._recording = False
        self._returns_tuple = [False] * len(self.blocks)
        for index, block in enumerate(self.blocks):
            block.forward = self._wrapped(index, block.forward)

    @torch.inference_mode()
    def hidden(self, tokens: torch.Tensor, *, start: int = 0) -> torch.Tensor:
        """Final hidden states [B, L, H] of tokens [B, L], as the head reads them.

        Args:
            tokens: int64, on the model's device.
            start: first block to run; earlier ones reuse the boundaries recorded by `record`.
        """
        self._start = start
        with self._without_head() as seen:
            self.model(input_ids=tokens, use_cache=False)
        return seen[0]

    def record(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Boundaries]:
        """Final hidden states and the input of every block."""
        self._boundaries, self._recording = [], True
        try:
            return self.hidden(tokens), self._boundaries
        finally:
            self._recording = False

    def reuse(self, boundaries: Boundaries) -> None:
        """Let the following forwards start from these states."""
        self._boundaries = boundaries

    @contextmanager
    def _without_head(self) -> Iterator[list[torch.Tensor]]:
        """Catch what the head would read; the head returns it unmultiplied."""
        seen: list[torch.Tensor] = []

        def catch(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden)
            return hidden

        forward = self.head.forward
        self.head.forward = catch  # type: ignore[method-assign]
        try:
            yield seen
        finally:
            self.head.forward = forward  # type: ignore[method-assign]

    def _wrapped(self, index: int, forward: Any) -> Any:
        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if index < self._start:
                return (hidden_states,) if self._returns_tuple[index] else hidden_states
            if index == self._start and index > 0:
                hidden_states = self._boundaries[index]
            if self._recording:
                self._boundaries.append(hidden_states)
            result = forward(hidden_states, *args, **kwargs)
            self._returns_tuple[index] = isinstance(result, tuple)
            return result

        return run


def _decoder_blocks(model: Any) -> list[Any]:
    """The blocks of the text decoder: the list whose length the configuration names."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and count > 0:
            return list(module)
    return []
