"""BF16: the weight as it is."""

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from autoquant.formats.base import CODES, Format, Part
from autoquant.formats.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from autoquant.formats.choice import Choice
    from autoquant.formats.packed import Packed, Statistics


class Bf16(Format):
    """What every model is measured against; never encoded by a search."""

    name = "bf16"
    weight_bits = Fraction(16)

    def parts(self, out_features: int, in_features: int, choice: "Choice") -> Mapping[str, Part]:
        """The weight alone."""
        return {CODES: Part("BF16", (out_features, in_features))}

    def encode(self, weight: "Tensor", choice: "Choice", statistics: "Statistics") -> "Packed":
        """The weight itself."""
        from autoquant.formats.packed import Packed

        return Packed(choice, {CODES: weight}, len(weight) if weight.ndim == 3 else None)

    def decode(self, packed: "Packed", out: "Tensor | None" = None) -> "Tensor":
        """The weight itself."""
        weight = packed.parts[CODES]
        return weight if out is None else out.copy_(weight)


BF16_FORMAT = register(Bf16())
