"""What a quantized linear stores, under the names of each layout.

All layouts hold the same codes and block scales. Formats say how each layout names and shapes
their parts (`LayoutForm`).
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from autoquant.errors import ConfigError
from autoquant.formats import INPUT_SCALE, Choice, Format, LayoutForm
from autoquant.plan.linears import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from autoquant.formats.packed import Packed


class Layout(StrEnum):
    """Who reads the checkpoint."""

    MODELOPT = "modelopt"
    """vLLM, SGLang and TensorRT-LLM."""
    COMPRESSED_TENSORS = "compressed-tensors"
    """vLLM, SGLang and transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor that the exported checkpoint stores."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def form_of(layout: Layout, format: Format) -> LayoutForm:
    """How a layout holds a format.

    Raises:
        ConfigError: it does not.
    """
    form = format.layouts.get(layout)
    if form is None:
        raise ConfigError(
            f"the layout {layout} has no form for {format.label} weights.",
            fix=f"close {format} in the search space, or choose another layout.",
        )
    return form


def stored_tensors(linear: Linear, choice: Choice, layout: Layout) -> dict[str, StoredTensor]:
    """What a quantized linear stores, by part, its codes first."""
    form = form_of(layout, choice.format)
    parts = choice.format.parts(linear.out_features, linear.in_features, choice)
    return {
        name: StoredTensor(
            name=linear.name + form.names[name],
            dtype=part.dtype,
            shape=part.shape or form.scalar_shape,
        )
        for name, part in parts.items()
    }


def to_store(
    linear: Linear, packed: "Packed", choice: Choice, input_amax: float, layout: Layout
) -> "dict[str, Tensor]":
    """The tensors that a quantized linear stores, by their names.

    Args:
        linear: [N, K].
        packed: its codes.
        choice: what the checkpoint declares.
        input_amax: largest calibrated input; not stored where inputs stay in BF16.
        layout: whose names.
    """
    import torch

    form = form_of(layout, choice.format)
    parts = dict(packed.parts)
    if not choice.keeps_input:
        parts[INPUT_SCALE] = torch.tensor(choice.format.input_scale(input_amax))
    return {
        linear.name + form.names[name]: _as_stored(part, name, form) for name, part in parts.items()
    }


def _as_stored(part: "Tensor", name: str, form: LayoutForm) -> "Tensor":
    if part.ndim:
        return part.cpu()
    return (1 / part if name in form.reciprocals else part).reshape(form.scalar_shape).cpu()
