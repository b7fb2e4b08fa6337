"""Which linears read the same tensor in a forward, held against what their names say.

The groups follow the engines' own tables, and names where no engine knows a linear. A forward knows
nothing of engines, but linears that an engine multiplies as one matrix must read one tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from autoquant.model.live import QuantizedModel
from autoquant.plan.linears import Linear
from autoquant.source import names as table

Tensors = Mapping[str, int]
"""The number of the tensor that each linear read."""


def input_disagreements(
    quantized: QuantizedModel, forward: Callable[[], object]
) -> tuple[str, ...]:
    """Groups for which names and a forward disagree, one line each.

    Single experts that are modules of their own are left out: they share a scale although each
    reads other tokens.

    Args:
        quantized: the live model.
        forward: runs it, block by block.
    """
    linears = {
        linear.name: linear
        for slot in quantized.dense_slots
        for linear in slot.linears
        if table.ROUTED_EXPERT.fullmatch(linear.name) is None
    }
    read = _trace(quantized, forward)
    seen = [linear for name, linear in linears.items() if name in read]
    return (*_joined_by_name_alone(seen, read), *_joined_by_input_alone(seen, read))


def _trace(quantized: QuantizedModel, forward: Callable[[], object]) -> Tensors:
    numbers = _Numbers()
    read: dict[str, int] = {}
    hooks = []
    for slot in quantized.dense_slots:

        def keep(module: Any, inputs: tuple[Any, ...], slot: Any = slot) -> None:
            match = table.LAYER.fullmatch(slot.name)
            number = numbers.of(inputs[0], match["layer"] if match else "")
            read.update((linear.name, number) for linear in slot.linears)

        hooks.append(slot.module.register_forward_pre_hook(keep))
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
        quantized.forget_inputs()
    return read


class _Numbers:
    """A number for each tensor, the same for views of one.

    The tensors of a layer are kept until the next one's, so that no address is used twice in it.
    """

    def __init__(self) -> None:
        self._layer = ""
        self._alive: list[torch.Tensor] = []
        self._known: dict[tuple[int, int], int] = {}
        self._count = 0

    def of(self, tensor: torch.Tensor, layer: str) -> int:
        """The number of what a linear of a layer reads."""
        if layer != self._layer:
            self._alive.clear()
            self._known.clear()
            self._layer = layer
        key = tensor.data_ptr(), tensor.numel()
        if key not in self._known:
            self._known[key] = self._count
            self._count += 1
            self._alive.append(tensor)
        return self._known[key]


def _joined_by_name_alone(linears: Iterable[Linear], read: Tensors) -> Iterator[str]:
    by_set: dict[str, list[Linear]] = {}
    for linear in linears:
        by_set.setdefault(linear.input_scale_set, []).append(linear)
    for name, members in by_set.items():
        if len({read[linear.name] for linear in members}) > 1:
            yield (
                f"{name}: by their names {_listed(members)} are one matrix in engines, and in a "
                "forward they read different tensors; their shared input scale may not fit."
            )


def _joined_by_input_alone(linears: Iterable[Linear], read: Tensors) -> Iterator[str]:
    by_input: dict[tuple[str, int], list[Linear]] = {}
    for linear in linears:
        parent = linear.name.rpartition(".")[0]
        by_input.setdefault((parent, read[linear.name]), []).append(linear)
    for members in by_input.values():
        sets = dict.fromkeys(linear.input_scale_set for linear in members)
        if len(sets) > 1 and not all(linear.is_known for linear in members):
            yield (
                f"{', '.join(sets)}: by their names {_listed(members)} are matrices of their own, "
                "and in a forward they read the same tensor; an engine that joins them needs one "
                "format."
            )


def _listed(linears: Iterable[Linear]) -> str:
    return ", ".join(linear.name.rpartition(".")[2] for linear in linears)
