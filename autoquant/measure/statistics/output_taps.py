"""Sees the gradients at what the weights of a block give.

Shapes: R rows that a weight multiplies, N outputs.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from autoquant.forward.taps import tapped
from autoquant.measure.statistics.taps import See, ShownExperts
from autoquant.model.binding import DenseSlot
from autoquant.model.live import QuantizedModel
from autoquant.plan.linears import LayerGroup
from autoquant.source.names import ROUTED_EXPERT


class OutputTaps:
    """Taps behind the weights of some groups, one for each weight and expert.

    Args:
        quantized: the live model.
        groups: of one block.
        see: is shown the gradient [R, N] at every product, in the backward passes of the forwards
            inside, with the input set and the matrix of it; tokens are those of `taps.See`.
    """

    def __init__(self, quantized: QuantizedModel, groups: Collection[LayerGroup], see: See) -> None:
        self._quantized, self._see = quantized, see
        names = {group.name for group in groups}
        self._slots = [slot for group, slot in quantized.slots if group.name in names]

    def installed(self) -> AbstractContextManager[None]:
        """See the forwards inside; their backward passes belong inside too."""
        return self._quantized.replacing(self._taps())

    def _taps(self) -> Iterator[tuple[Any, str, Any]]:
        for slot in self._slots:
            if isinstance(slot, DenseSlot):
                yield slot.module, "forward", _DenseTap(self._see, slot, slot.module.forward)
            else:
                hook = slot.module.autoquant_hook
                yield slot.module, "autoquant_hook", _ExpertsTap(self._see, slot, hook)


class _DenseTap:
    """Stands in for the forward of one linear."""

    def __init__(self, see: See, slot: DenseSlot, forward: Callable[[Tensor], Tensor]) -> None:
        expert = ROUTED_EXPERT.fullmatch(slot.name)
        self._see, self._forward = see, forward
        self._set, self._matrix = slot.input_scale_set, int(expert["index"]) if expert else 0

    def __call__(self, x: Tensor) -> Tensor:
        return tapped(x, self._forward(x), self._receive)

    def _receive(self, x: Tensor, y: Tensor, gradient: Tensor) -> None:
        self._see(self._set, self._matrix, gradient.flatten(0, -2), None)


class _ExpertsTap(ShownExperts):
    """Shows the gradients at what experts give."""

    def product(self, part: str, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        tokens, sizes = self.tokens, counts.tolist()

        def receive(x: Tensor, y: Tensor, gradient: Tensor) -> None:
            self.show(part, gradient, sizes, tokens)

        return tapped(rows, super().product(part, rows, weight, counts), receive)
