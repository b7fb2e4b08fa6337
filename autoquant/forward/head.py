"""Logits of final hidden states, in float32 from the BF16 operands, a tile of tokens at a time.

So the head's output rounding is not charged to any candidate, and no batch's logits are in memory
as a whole.

Shapes: B sequences, L tokens, T tokens of a tile, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from autoquant.forward.trunk import Trunk
from autoquant.model.live import QuantizedModel
from autoquant.model.streaming.work import LOGIT_TILE_BYTES

CPU_TILE_BYTES = 1 << 26
GPU_TILE_TOKENS = 128
"""Size of one float32 logit tile. A GPU's matrix product needs hundreds of tokens, a multiple of
its own tile, to run at full speed; a CPU's fits the caches better with less."""


class Head:
    """The vocabulary head of a live model.

    Args:
        trunk: of the model, whose own head it is.
        quantized: says what the head multiplies with under the choices in force.
    """

    def __init__(self, trunk: Trunk, quantized: QuantizedModel) -> None:
        self.module: Any = trunk.head
        self._trunk = trunk
        self._quantized = quantized

    def spans(self, hidden: torch.Tensor) -> Iterator[slice]:
        """The tokens of each tile of hidden states [B, L, H]."""
        tokens = hidden[..., 0].numel()
        rows = min(self._tile_rows(hidden), tokens)
        for start in range(0, tokens, rows):
            yield slice(start, min(start + rows, tokens))

    def buffers(self, hidden: torch.Tensor, count: int) -> torch.Tensor:
        """Room for `count` tiles of logits of `hidden`, float32 [count, T, V]."""
        rows = min(self._tile_rows(hidden), hidden[..., 0].numel())
        shape = (count, rows, self.module.weight.shape[0])
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 logits [T, V] of hidden states [T, H], by the head in BF16."""
        return self._finished(self._product(hidden, self.module.weight, out))

    def candidate_logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The same by the head under the choices in force."""
        return self._finished(self._product(*self._quantized.operands(self.module, hidden), out))

    @torch.no_grad()
    def pull_back(
        self, hidden: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The gradient at final hidden states [B, L, H] of the sum of logits times `change`.

        Args:
            hidden: of the BF16 model.
            change: from a tile of float32 logits [T, V] to as many factors, taken as constants; it
                may write over the logits.
        """
        weight = self.module.weight
        weight = weight if hidden.is_cuda else self._quantized.products.copies.of(weight)
        flat = hidden.flatten(0, 1)
        tiles = flat.split(self._tile_rows(hidden))
        at_head = (self._at_head(self._product(tile, weight), change) for tile in tiles)
        parts = [factors.to(weight.dtype) @ weight for factors in at_head]
        return torch.cat(parts).to(hidden.dtype).view_as(hidden)

    def _tile_rows(self, hidden: torch.Tensor) -> int:
        """Tokens of one logit tile."""
        vocabulary: int = self.module.weight.shape[0]
        if not hidden.is_cuda:
            return max(1, CPU_TILE_BYTES // (4 * vocabulary))
        rows = max(1, LOGIT_TILE_BYTES // (4 * vocabulary))
        return rows - rows % GPU_TILE_TOKENS if rows > GPU_TILE_TOKENS else rows

    def _finished(self, output: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] of the head's output, which some models scale or cap."""
        return self._trunk.behind_head(output) if self._trunk.changes_logits else output

    def _at_head(
        self, output: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The gradient at the head's output [T, V] of the sum of logits times `change`."""
        if not self._trunk.changes_logits:
            return change(output)
        with torch.enable_grad():
            logits = self._finished(output.requires_grad_())
        return torch.autograd.grad(logits, output, change(logits.detach().clone()))[0]

    def _product(
        self, hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 logits [T, V] of hidden states [T, H] under a head weight [V, H]."""
        bias = self.module.bias
        if hidden.is_cuda:
            logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
        else:
            wide = self._quantized.products.copies.of(weight)
            logits = torch.mm(hidden.float(), wide.t(), out=out)
        return logits if bias is None else logits.add_(bias.float())
