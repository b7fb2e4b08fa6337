"""FP8: E4M3 codes with one float32 scale per tensor, for weights and inputs alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from autoquant.formats.base import (
    CAST,
    CODES,
    GPTQ,
    INPUT_SCALE,
    NEAREST,
    REFIT,
    SCALE,
    Coder,
    Format,
    LayoutForm,
    Part,
    Parts,
)
from autoquant.formats.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from autoquant.formats.choice import Choice
    from autoquant.formats.packed import Packed, Statistics

_NAMES = {CODES: ".weight", SCALE: ".weight_scale", INPUT_SCALE: ".input_scale"}


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Coder(Coder):
    """Codes under the scale of the whole weight; what errors push beyond it saturates."""

    def plain(self, weight: "Tensor") -> Parts:
        """See `autoquant_kernels.quantize_fp8`."""
        import autoquant_kernels as kernels

        return {CODES: kernels.quantize_fp8(weight, self.scale)}

    def compensate(self, columns: "Tensor", upper: "Tensor") -> "tuple[Parts, Tensor]":
        """See `autoquant_kernels.compensate_fp8`."""
        import autoquant_kernels as kernels

        codes, errors = kernels.compensate_fp8(columns, upper, self.scale)
        return {CODES: codes}, errors

    def decode(self, parts: Parts) -> "Tensor":
        """See `autoquant_kernels.dequantize_fp8`."""
        import autoquant_kernels as kernels

        return kernels.dequantize_fp8(parts[CODES], self.scale)


class Fp8(Format):
    """E4M3 codes."""

    name = "fp8"
    weight_bits = Fraction(8)
    input_bits = 8
    scale_rules = (None, CAST)
    roundings = (NEAREST, GPTQ, REFIT)
    tensor_scale = SCALE
    kept_codes = "F8_E4M3"
    layouts: ClassVar[Mapping[str, LayoutForm]] = {
        "modelopt": LayoutForm(
            names=_NAMES,
            declared={
                "algorithm": {None: "FP8"},
                "numbers": {"dynamic": False, "num_bits": 8, "type": "float"},
                "quantizer": {"num_bits": [4, 3], "axis": None},
                "presets": {"FP8_DEFAULT_CFG": "fp8"},
            },
        ),
        "compressed-tensors": LayoutForm(
            names=_NAMES,
            scalar_shape=(1,),
            declared={
                "format": "float-quantized",
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "tensor",
                    "symmetric": True,
                    "dynamic": False,
                },
                "input_activations": {},
            },
        ),
    }

    def parts(self, out_features: int, in_features: int, choice: "Choice") -> Mapping[str, Part]:
        """A byte a weight, and two float32 scales."""
        return {
            CODES: Part("F8_E4M3", (out_features, in_features)),
            SCALE: Part("F32", ()),
            INPUT_SCALE: Part("F32", ()),
        }

    def encode(self, weight: "Tensor", choice: "Choice", statistics: "Statistics") -> "Packed":
        """See `autoquant_kernels.quantize_fp8`."""
        import autoquant_kernels as kernels

        from autoquant.formats.packed import Packed

        if choice.is_cast:
            from autoquant.formats import cast

            scale = cast.fp8_scale(statistics.weight_amax)
        else:
            scale = kernels.fp8_scale(statistics.weight_amax)
        if self.needs_moments(choice):
            from autoquant.formats import fitted

            return fitted.encode(weight, choice, statistics, scale)
        experts = len(weight) if weight.ndim == 3 else None
        codes = kernels.quantize_fp8(weight, scale)
        return Packed(choice, {CODES: codes, SCALE: scale}, experts)

    def coder(self, choice: "Choice", scale: "Tensor") -> Coder:
        """Of the given scales, whatever the choice."""
        return Fp8Coder(scale)

    def decode(self, packed: "Packed", out: "Tensor | None" = None) -> "Tensor":
        """See `autoquant_kernels.dequantize_fp8`."""
        import autoquant_kernels as kernels

        return kernels.dequantize_fp8(packed.parts[CODES], packed.parts[SCALE], out=out)

    def input_scale(self, amax: float) -> float:
        """amax / 448 in float32."""
        import autoquant_kernels as kernels

        return kernels.fp8_scale(amax).item()

    def input(self, x: "Tensor", scale: float) -> "Tensor":
        """See `fake_quant_fp8`."""
        import autoquant_kernels as kernels

        return kernels.fake_quant_fp8(x, scale)


FP8_FORMAT = register(Fp8())
