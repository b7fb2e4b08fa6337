"""From names on disk to modules in memory.

transformers renames some checkpoints while loading (`block_sparse_moe` becomes `mlp`), joins
linears (gate and up in MiniMax-M3) and fuses experts into 3-D parameters; assignments and exports
keep the names on disk.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoquant.errors import SourceError
from autoquant.model import experts
from autoquant.plan.linears import LayerGroup, Linear

_EXPERT = re.compile(
    r"(?P<container>.+\.experts)\.(?P<index>\d+)\.(?P<product>gate_proj|up_proj|down_proj|w[123])"
)
_DOWN = frozenset({"down_proj", "w2"})


class Names:
    """Where a model keeps the tensors of its checkpoint, by the rules that it was loaded with.

    Args:
        model: a transformers model; one that was not loaded goes by its architecture's rules.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = getattr(model, "_weight_conversions", None)
        if rules is None:
            rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._order = {
            pattern: number
            for converter in self._converters
            for number, pattern in enumerate(converter.source_patterns)
        }
        self._prefix = model.base_model_prefix
        self._parameters = model.state_dict()
        self._modules = dict(model.named_modules())

    def locate(self, tensor: str) -> tuple[str, int]:
        """Name in memory of the parameter that holds a tensor, and which of its parts that is."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(
            tensor, self._renamings, self._converters, self._prefix, self._parameters
        )
        if name not in self._parameters and tensor in self._parameters:
            return tensor, 0
        return name, self._order.get(pattern, 0) if pattern is not None else 0

    def module_of(self, tensor: str) -> Any | None:
        """The module whose parameter holds a tensor, or None if the model has none."""
        return self._modules.get(self.locate(tensor)[0].rpartition(".")[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSlot:
    """The weight of one `nn.Linear`."""

    linears: tuple[Linear, ...]
    """Whose rows it holds, from the first to the last; more than one where memory joins them."""
    module: nn.Linear

    @property
    def name(self) -> str:
        """The checkpoint's name of the first linear."""
        return self.linears[0].name

    @property
    def weight_scale_set(self) -> str:
        return self.linears[0].weight_scale_set

    @property
    def input_scale_set(self) -> str:
        return self.linears[0].input_scale_set


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSlot:
    """All routed experts of a block: 3-D parameters of one module."""

    name: str
    """Container on disk: `model.layers.3.mlp.experts`."""
    module: Any
    wide: tuple[Linear, ...]
    """Gate and up of every expert, or up alone, in the order of the experts."""
    down: tuple[Linear, ...]

    @property
    def products(self) -> dict[str, tuple[Linear, ...]]:
        """The linears of each product, expert after expert."""
        return {experts.WIDE: self.wide, experts.DOWN: self.down}

    def unit_name(self, part: str) -> str:
        """What the weights of a product are called where codes are kept."""
        return f"{self.name}:{part}"

    @property
    def input_set(self) -> dict[str, str]:
        """Input scale set of each product."""
        return {
            experts.WIDE: self.wide[0].input_scale_set,
            experts.DOWN: self.down[0].input_scale_set,
        }


Slot = DenseSlot | ExpertsSlot


def bind(names: Names, group: LayerGroup) -> tuple[Slot, ...]:
    """Find the modules of a group's linears.

    Raises:
        SourceError: a linear has no module of its shape, or one that is no `nn.Linear`.
    """
    slots: list[Slot] = []
    for container, linears in _by_container(group):
        module = _fused_experts(names, container, linears[0]) if container else None
        if module is not None:
            slots.append(_experts_slot(container, module, linears))
        else:
            slots += _dense_slots(names, linears)
    return tuple(slots)


def _by_container(group: LayerGroup) -> Iterator[tuple[str, list[Linear]]]:
    """Linears by the expert container that they belong to; the empty name for the others."""
    containers: dict[str, list[Linear]] = {}
    for linear in group.linears:
        match = _EXPERT.fullmatch(linear.name)
        containers.setdefault(match["container"] if match else "", []).append(linear)
    yield from containers.items()


def _fused_experts(names: Names, container: str, linear: Linear) -> Any | None:
    """The module that holds all experts as 3-D parameters, if there is one.

    A checkpoint that joins its experts has no tensor of the name of a single one.
    """
    for tensor in (linear.tensor, f"{container}.down_proj"):
        module = names.module_of(tensor)
        if getattr(getattr(module, "down_proj", None), "ndim", 0) == 3:
            return module
    return None


def _dense_slots(names: Names, linears: list[Linear]) -> Iterator[DenseSlot]:
    """One slot for each module; linears that memory joins are in one."""
    parts: dict[str, list[tuple[int, Linear]]] = {}
    for linear in linears:
        name, number = names.locate(linear.tensor)
        parts.setdefault(name, []).append((number, linear))
    for numbered in parts.values():
        numbered.sort(key=lambda part: part[0])
        yield _dense_slot(names, tuple(linear for _, linear in numbered))


def _dense_slot(names: Names, linears: tuple[Linear, ...]) -> DenseSlot:
    first = linears[0]
    module = names.module_of(first.tensor)
    if module is None:
        raise SourceError(
            f"no module in memory carries the checkpoint's {first.name}.",
            fix="fix it to bf16 in the search space, or name the architecture in a report.",
        )
    if not isinstance(module, nn.Linear):
        raise SourceError(
            f"{first.name} is a {type(module).__name__}, and only nn.Linear and experts with 3-D "
            "parameters can be quantized.",
            fix="fix it to bf16 in the search space.",
        )
    if not _multiplies_as_linear(module):
        raise SourceError(
            f"{first.name} is a {type(module).__name__}, which multiplies otherwise than "
            "nn.Linear.",
            fix="fix it to bf16 in the search space.",
        )
    shape = (sum(linear.out_features for linear in linears), first.in_features)
    sets = {(linear.weight_scale_set, linear.input_scale_set) for linear in linears}
    if tuple(module.weight.shape) != shape or len(sets) > 1:
        raise SourceError(
            f"{first.name} is {shape} on disk and {tuple(module.weight.shape)} in memory.",
            fix="fix it to bf16 in the search space; its layout is not understood.",
        )
    return DenseSlot(linears=linears, module=module)


def _multiplies_as_linear(module: nn.Linear) -> bool:
    """Whether a module with a forward of its own gives what `nn.Linear` gives."""
    own, weight = type(module).forward, module.weight
    if own is nn.Linear.forward or weight.is_meta:
        return True
    x = torch.ones(1, 2, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad():
            found, expected = own(module, x), nn.Linear.forward(module, x)
    except RuntimeError:  # shapes that it does not take
        return False
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0.05, atol=1e-3)


def _experts_slot(container: str, module: Any, linears: list[Linear]) -> ExpertsSlot:
    experts.check_supported(container, module)
    by_index: dict[int, dict[str, Linear]] = {}
    for linear in linears:
        match = _EXPERT.fullmatch(linear.name)
        assert match is not None
        by_index.setdefault(int(match["index"]), {})[match["product"]] = linear
    wide, down = [], []
    for index in sorted(by_index):
        products = by_index[index]
        down += [linear for name, linear in products.items() if name in _DOWN]
        wide += [linear for name, linear in sorted(products.items()) if name not in _DOWN]
    if len(down) != module.num_experts:
        raise SourceError(
            f"{container}: {len(down)} experts on disk and {module.num_experts} in memory.",
            fix="check that config.json belongs to these weights.",
        )
    return ExpertsSlot(name=container, module=module, wide=tuple(wide), down=tuple(down))
