"""The weights of a live model that is in memory as a whole."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from autoquant.codes.weights import Block, Unit
from autoquant.model.binding import DenseSlot, ExpertsSlot, Slot
from autoquant.model.experts import parameter_name
from autoquant.plan.linears import LayerGroup


class ResidentWeights:
    """A `WeightSource` over the parameters of a model.

    Args:
        slots: where each group's linears are, by the group's name.
    """

    def __init__(self, slots: dict[str, tuple[Slot, ...]]) -> None:
        self._slots = slots
        self._tensors: dict[str, Tensor] = {}

    def units(self, group: LayerGroup) -> tuple[Unit, ...]:
        """One for each weight in memory: a linear's, or a product's of all experts."""
        found = []
        for slot in self._slots[group.name]:
            for unit, tensor in units_of(slot, group.layer):
                self._tensors[unit.name] = tensor
                found.append(unit)
        return tuple(found)

    @contextmanager
    def block(self, layer: int | None) -> Iterator[Block]:
        """Everything is there already."""
        yield self

    def device(self, unit: Unit) -> torch.device:
        """Where the parameter is."""
        return self._tensors[unit.name].device

    def weight(self, unit: Unit) -> Tensor:
        """The parameter itself; never written to."""
        return self._tensors[unit.name]


def units_of(slot: Slot, layer: int | None) -> Iterator[tuple[Unit, Tensor]]:
    """The units of a slot, each with its parameter."""
    if isinstance(slot, DenseSlot):
        yield Unit(name=slot.name, layer=layer, matrices=(slot.linears,)), slot.module.weight
    else:
        yield from _experts_units(slot, layer)


def _experts_units(slot: ExpertsSlot, layer: int | None) -> Iterator[tuple[Unit, Tensor]]:
    for part, linears in slot.products.items():
        each = len(linears) // slot.module.num_experts
        matrices = tuple(linears[i : i + each] for i in range(0, len(linears), each))
        unit = Unit(name=slot.unit_name(part), layer=layer, matrices=matrices, is_stack=True)
        yield unit, getattr(slot.module, parameter_name(slot.module, part))
