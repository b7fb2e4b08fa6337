"""The weights of a live model, block by block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from autoquant.codes.weights import Block, Unit
from autoquant.model.binding import DenseSlot, ExpertsSlot, Slot
from autoquant.model.experts import parameter_name
from autoquant.model.streaming.stores import BlockStore
from autoquant.plan.linears import LayerGroup


class LiveWeights:
    """A `WeightSource` over the parameters of a model.

    Args:
        slots: where each group's linears are, by the group's name.
        store: brings the weights of blocks; None where all of them are there.
    """

    def __init__(self, slots: dict[str, tuple[Slot, ...]], store: BlockStore | None = None) -> None:
        self._slots = slots
        self._store = store
        self._places: dict[str, tuple[Any, str]] = {}

    def units(self, group: LayerGroup) -> tuple[Unit, ...]:
        """One for each weight in memory: a linear's, or a product's of all experts."""
        found = []
        for slot in self._slots[group.name]:
            for unit, name in units_of(slot, group.layer):
                self._places[unit.name] = slot.module, name
                found.append(unit)
        return tuple(found)

    @contextmanager
    def block(self, layer: int | None) -> Iterator[Block]:
        """The block's weights; they stay until another block's are asked for."""
        if self._store is not None and layer is not None:
            self._store.open(layer)
        yield self

    def device(self, unit: Unit) -> torch.device:
        """Where the parameter is."""
        with self.block(unit.layer):
            return self.weight(unit).device

    def weight(self, unit: Unit) -> Tensor:
        """The parameter itself; never written to."""
        module, name = self._places[unit.name]
        weight: Tensor = getattr(module, name)
        return weight


def units_of(slot: Slot, layer: int | None) -> Iterator[tuple[Unit, str]]:
    """The units of a slot, each with the name of its parameter."""
    if isinstance(slot, DenseSlot):
        yield Unit(name=slot.name, layer=layer, matrices=(slot.linears,)), "weight"
    else:
        yield from _experts_units(slot, layer)


def _experts_units(slot: ExpertsSlot, layer: int | None) -> Iterator[tuple[Unit, str]]:
    for part, linears in slot.products.items():
        each = len(linears) // slot.module.num_experts
        matrices = tuple(linears[i : i + each] for i in range(0, len(linears), each))
        unit = Unit(name=slot.unit_name(part), layer=layer, matrices=matrices, is_stack=True)
        yield unit, parameter_name(slot.module, part)
