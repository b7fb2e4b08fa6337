"""Sees what the weights of a block multiply.

Shapes: R rows that a weight multiplies, K inputs.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoquant.model.binding import DenseSlot, ExpertsSlot
from autoquant.model.experts import ExpertsHook, ExpertsTap
from autoquant.model.live import QuantizedModel
from autoquant.plan.linears import LayerGroup
from autoquant.source.names import ROUTED_EXPERT

See = Callable[[str, int, Tensor, Tensor | None], None]
"""Takes an input set, the matrix of it that multiplies, its rows [R, K], and the token of each row,
int64 [R] ascending; None where rows are the tokens in order, or unknown tokens of an expert that is
a module of its own."""


@dataclass(frozen=True, slots=True)
class InputSetShape:
    """What reads one input set."""

    experts: int | None
    """Matrices with rows of their own; None for one weight."""
    inputs: int
    """K."""
    device: torch.device


class InputTaps:
    """Taps before the weights of some groups, one for each input set and expert.

    Args:
        quantized: the live model.
        groups: of one block.
        see: is shown every input.
    """

    def __init__(self, quantized: QuantizedModel, groups: Collection[LayerGroup], see: See) -> None:
        self.sets: dict[str, InputSetShape] = {}
        self._see = see
        self._quantized = quantized
        self._dense: dict[Any, tuple[str, int]] = {}
        """Input set and matrix of one linear for each."""
        names = {group.name for group in groups}
        slots = [slot for group, slot in quantized.slots if group.name in names]
        self._stacks = [slot for slot in slots if isinstance(slot, ExpertsSlot)]
        for slot in self._stacks:
            device = next(slot.module.parameters()).device
            for part, linears in slot.products.items():
                width = linears[0].in_features
                shape = InputSetShape(slot.module.num_experts, width, device)
                self.sets[slot.input_set[part]] = shape
        self._watch_dense([slot for slot in slots if isinstance(slot, DenseSlot)])

    def installed(self) -> AbstractContextManager[None]:
        """See the forwards inside."""
        return self._quantized.replacing(self._taps())

    def _taps(self) -> Iterator[tuple[Any, str, Any]]:
        for module in self._dense:
            yield module, "forward", _DenseTap(self, module, module.forward)
        for slot in self._stacks:
            hook = slot.module.autoquant_hook
            yield slot.module, "autoquant_hook", _ExpertsTap(self._see, slot, hook)

    def see(self, module: Any, x: Tensor) -> None:
        """Show an input [..., K] of a linear."""
        name, matrix = self._dense[module]
        self._see(name, matrix, x.flatten(0, -2), None)

    def _watch_dense(self, slots: Collection[DenseSlot]) -> None:
        """Watch one linear of each input set, and of each expert where experts are modules."""
        matches = [ROUTED_EXPERT.fullmatch(slot.linears[0].name) for slot in slots]
        indices = [int(match["index"]) if match else None for match in matches]
        watched: set[tuple[str, int | None]] = set()
        for slot, index in zip(slots, indices, strict=True):
            name = slot.input_scale_set
            if (name, index) in watched:
                continue
            watched.add((name, index))
            self._dense[slot.module] = name, index or 0
            experts = None if index is None else 1 + max(i for i in indices if i is not None)
            device = next(slot.module.parameters()).device
            shape = InputSetShape(experts, slot.linears[0].in_features, device)
            self.sets.setdefault(name, shape)


class _DenseTap:
    """Stands in for the forward of one linear."""

    def __init__(self, taps: InputTaps, module: Any, forward: Callable[[Tensor], Tensor]) -> None:
        self._taps, self._module, self._forward = taps, module, forward

    def __call__(self, x: Tensor) -> Tensor:
        self._taps.see(self._module, x)
        return self._forward(x)


class ShownExperts(ExpertsTap):
    """Stands before the hook that quantizes the operands of a block's experts, and shows rows.

    Args:
        see: is shown them.
        slot: of the experts.
        inner: the hook.
    """

    def __init__(self, see: See, slot: ExpertsSlot, inner: ExpertsHook) -> None:
        super().__init__(inner)
        self._see, self._sets = see, slot.input_set

    def show(self, part: str, rows: Tensor, sizes: list[int], tokens: Tensor | None) -> None:
        """Show those [R, *] of each expert of a product, and the token of each, int64 [R]."""
        assert tokens is not None
        parts = zip(rows.split(sizes), tokens.split(sizes), strict=True)
        for expert, (own, of_rows) in enumerate(parts):
            self._see(self._sets[part], expert, own, of_rows)


class _ExpertsTap(ShownExperts):
    """Shows what experts multiply."""

    def product(self, part: str, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        self.show(part, rows, counts.tolist(), self.tokens)
        return super().product(part, rows, weight, counts)
