"""What an exported checkpoint stores of a quantized linear, in each layout.

Both layouts hold the same codes and block scales. compressed-tensors names some tensors otherwise,
gives scalars one axis, and stores the reciprocals of NVFP4's two scalars.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from autoquant.formats import NVFP4_BLOCK, Format
from autoquant.plan.linears import Linear


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """What follows a linear's name in the names of its tensors."""

    weight: str
    weight_scale: str
    """E4M3 block scales of NVFP4, the float32 scale of FP8."""
    global_scale: str | None
    """The float32 scale of NVFP4 block scales; FP8 has none."""
    input_scale: str
    scalar_shape: tuple[int, ...]
    stores_reciprocals: bool = False
    """Whether `global_scale` and `input_scale` hold what divides instead of what multiplies."""

    @property
    def scalars(self) -> tuple[str, str]:
        """The weight's float32 scalar, then the input's."""
        return self.global_scale or self.weight_scale, self.input_scale

    @property
    def scales(self) -> tuple[str, ...]:
        """Everything but the weight."""
        found = (self.weight_scale, self.global_scale, self.input_scale)
        return tuple(name for name in found if name is not None)

    def stored(self, scalar: Tensor) -> Tensor:
        """A 0-dimensional float32 scale as this layout stores it."""
        return (1 / scalar if self.stores_reciprocals else scalar).reshape(self.scalar_shape)


_NAMES: Mapping[tuple[Layout, Format], TensorNames] = {
    (Layout.MODELOPT, Format.NVFP4): TensorNames(
        weight=".weight",
        weight_scale=".weight_scale",
        global_scale=".weight_scale_2",
        input_scale=".input_scale",
        scalar_shape=(),
    ),
    (Layout.MODELOPT, Format.FP8): TensorNames(
        weight=".weight",
        weight_scale=".weight_scale",
        global_scale=None,
        input_scale=".input_scale",
        scalar_shape=(),
    ),
    (Layout.COMPRESSED_TENSORS, Format.NVFP4): TensorNames(
        weight=".weight_packed",
        weight_scale=".weight_scale",
        global_scale=".weight_global_scale",
        input_scale=".input_global_scale",
        scalar_shape=(1,),
        stores_reciprocals=True,
    ),
    (Layout.COMPRESSED_TENSORS, Format.FP8): TensorNames(
        weight=".weight",
        weight_scale=".weight_scale",
        global_scale=None,
        input_scale=".input_scale",
        scalar_shape=(1,),
    ),
}


def tensor_names(layout: Layout, format: Format) -> TensorNames:
    """Names of a linear's tensors in a format other than BF16."""
    return _NAMES[layout, format]


def stored_tensors(linear: Linear, format: Format, layout: Layout) -> tuple[StoredTensor, ...]:
    """What a quantized linear stores, its weight first."""
    names = tensor_names(layout, format)
    rows, columns = linear.out_features, linear.in_features
    if format is Format.FP8:
        large = {names.weight: ("F8_E4M3", (rows, columns))}
    else:
        large = {
            names.weight: ("U8", (rows, columns // 2)),
            names.weight_scale: ("F8_E4M3", (rows, columns // NVFP4_BLOCK)),
        }
    small = dict.fromkeys(names.scalars, ("F32", names.scalar_shape))
    return tuple(
        StoredTensor(name=linear.name + end, dtype=dtype, shape=shape)
        for end, (dtype, shape) in (large | small).items()
    )
