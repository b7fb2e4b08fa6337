"""The weights of a model as choices store them, for ModelOpt's weight quantizers."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autoquant.formats import Choice
from autoquant.measure.session import Session
from autoquant.model.binding import DenseSlot
from autoquant.model.experts import parameter_name


class StoredWeights:
    """A backend of ModelOpt: what a weight quantizer is given, as a choice stores it.

    A quantizer is given a parameter, or the view of one expert. Which one it is shows in the
    memory that it lies in, so that the model's parameters must stay where they are.

    Args:
        model: ModelOpt's copy of the session's model.
        session: has the codes.
        choices: of the groups whose weights are asked for.
    """

    def __init__(self, model: nn.Module, session: Session, choices: Mapping[str, Choice]) -> None:
        self._stored: dict[int, torch.Tensor] = {}
        for parameter, weight in _stored(model, session, choices):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            self._stored[_memory(parameter)] = weight

    def __call__(self, x: torch.Tensor, quantizer: Any) -> torch.Tensor:
        stored = self._stored[_memory(x)]
        return stored.as_strided(x.size(), x.stride(), x.storage_offset())


def _stored(
    model: nn.Module, session: Session, choices: Mapping[str, Choice]
) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Yield each parameter of a group, and what its codes decode to, of the same shape."""
    names = {module: name for name, module in session.loaded.model.named_modules()}
    book = session.quantized.book
    for group, slot in session.quantized.slots:
        if group.name not in choices:
            continue
        module: Any = model.get_submodule(names[slot.module])
        units = {unit.name: unit for unit in book.units(group)}
        if isinstance(slot, DenseSlot):
            found = {slot.name: module.weight}
        else:
            found = {
                slot.unit_name(part): getattr(module, parameter_name(slot.module, part))
                for part in slot.products
            }
        for name, parameter in found.items():
            yield parameter, book.unit(group, units[name], choices[group.name].of_weight).decode()


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()
