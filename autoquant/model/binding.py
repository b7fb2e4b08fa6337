"""From names on disk to modules in memory.

transformers renames some checkpoints while loading (`block_sparse_moe` becomes `mlp`) and fuses
experts into 3-D parameters; assignments and exports keep the names on disk.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from autoquant.errors import SourceError
from autoquant.groups import LayerGroup, Linear
from autoquant.model import experts

_EXPERT = re.compile(
    r"(?P<container>.+\.experts)\.(?P<index>\d+)\.(?P<product>gate_proj|up_proj|down_proj|w[123])"
)
_DOWN = frozenset({"down_proj", "w2"})

_RENAMES = (
    ("", ""),
    ("block_sparse_moe.", "mlp."),
    ("model.language_model.", "language_model.model."),
    ("language_model.model.", "model.language_model."),
    ("backbone.", "model."),
    ("transformer.", "model."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSlot:
    """A linear that is a module of its own."""

    linear: Linear
    module: nn.Linear


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
    def input_set(self) -> dict[str, str]:
        """Input scale set of each product."""
        return {
            experts.WIDE: self.wide[0].input_scale_set,
            experts.DOWN: self.down[0].input_scale_set,
        }


Slot = DenseSlot | ExpertsSlot


def bind(model: nn.Module, group: LayerGroup) -> tuple[Slot, ...]:
    """Find the modules of a group's linears.

    Raises:
        SourceError: a linear has no module of its shape, or one that is no `nn.Linear`.
    """
    modules = dict(model.named_modules())
    slots: list[Slot] = []
    for container, linears in _by_container(group):
        module = _find(modules, container) if container else None
        if module is not None and _holds_fused(module):
            slots.append(_experts_slot(container, module, linears))
        else:
            slots += [_dense_slot(modules, linear) for linear in linears]
    return tuple(slots)


def _by_container(group: LayerGroup) -> Iterator[tuple[str, list[Linear]]]:
    """Linears by the expert container that they belong to; the empty name for the others."""
    containers: dict[str, list[Linear]] = {}
    for linear in group.linears:
        match = _EXPERT.fullmatch(linear.name)
        containers.setdefault(match["container"] if match else "", []).append(linear)
    yield from containers.items()


def _holds_fused(module: Any) -> bool:
    return any(hasattr(module, name) for name in ("gate_up_proj", "up_proj")) and (
        getattr(getattr(module, "down_proj", None), "ndim", 0) == 3
    )


def _find(modules: dict[str, nn.Module], name: str) -> Any | None:
    for old, new in _RENAMES:
        found = modules.get(name.replace(old, new) if old else name)
        if found is not None:
            return found
    return None


def _dense_slot(modules: dict[str, nn.Module], linear: Linear) -> DenseSlot:
    module = _find(modules, linear.name)
    if module is None:
        raise SourceError(
            f"no module in memory carries the checkpoint's {linear.name}.",
            fix="fix it to bf16 in the search space, or name the architecture in a report.",
        )
    if not isinstance(module, nn.Linear):
        raise SourceError(
            f"{linear.name} is a {type(module).__name__}, and only nn.Linear and experts with 3-D "
            "parameters can be quantized.",
            fix="fix it to bf16 in the search space.",
        )
    shape = (linear.out_features, linear.in_features)
    if tuple(module.weight.shape) != shape:
        raise SourceError(
            f"{linear.name} is {shape} on disk and {tuple(module.weight.shape)} in memory.",
            fix="fix it to bf16 in the search space; its layout is not understood.",
        )
    return DenseSlot(linear=linear, module=module)


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
