"""What a format says of itself: sizes, shapes, codes, input, and how checkpoints declare it.

A format is one file of this folder: an object of a subclass of `Format`, registered in
`formats/__init__.py`. Nothing else names it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from torch import Tensor

    from autoquant.formats.choice import Choice
    from autoquant.formats.moments import Moments
    from autoquant.formats.packed import Packed, Statistics

NEAREST, GPTQ, REFIT = "nearest", "gptq", "refit"
"""Roundings. Every format has the first: each code the nearest to its weight; the second carries
errors into later columns (`compensated.py`); the third does so with weights that make up for what
the quantized blocks before have changed (`refitted.py`), so that it belongs to one assignment and
no search space may name it."""
CAST = "cast"
"""A scale rule: the codes that a source stores, under powers of two (`cast.py`). Only for weights
that are stored so, and only with the first rounding."""
A16 = "a16"
"""The input that stays in BF16 where the format's own would be quantized."""

SCALAR_BYTES = 4
"""Every per-tensor scale is a float32 number."""

CODES, SCALE, GLOBAL_SCALE, INPUT_SCALE = "codes", "scale", "global_scale", "input_scale"
"""Parts that a quantized linear may store; the first three are its weight's."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that a linear stores: its dtype as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Data of the tensor."""
        size = _DTYPE_BYTES[self.dtype]
        for length in self.shape:
            size *= length
        return size


_DTYPE_BYTES = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutForm:
    """How one layout stores and declares a format."""

    names: Mapping[str, str]
    """What follows a linear's name in the name of each part."""
    scalar_shape: tuple[int, ...] = ()
    """Of per-tensor scales."""
    reciprocals: frozenset[str] = frozenset()
    """Parts that are stored as what divides instead of what multiplies."""
    declared: Mapping[str, Any] = field(default_factory=dict)
    """What the layout's JSON says of the format; the layout knows the keys."""


Parts = Mapping[str, "Tensor"]
"""Codes of M matrices by the names of their parts, each [M, N, ...]."""


@dataclass(frozen=True, slots=True, eq=False)
class Coder(ABC):
    """How M matrices with scales of their own are coded in a format that fits codes to inputs.

    Shapes: N outputs, K inputs.
    """

    scale: "Tensor"
    """Of each matrix, float32 [M] on the host."""

    @abstractmethod
    def plain(self, weight: "Tensor") -> Parts:
        """The nearest codes of BF16 [M, N, K] alone, which fitted ones have to beat."""

    def weighted(self, weight: "Tensor", moments: "Moments", tokens: slice) -> Parts:
        """The nearest codes of BF16 [M, N, K] under scales that weigh by inputs of these tokens."""
        raise TypeError(f"{type(self).__name__} has no scales that weigh by inputs")

    @abstractmethod
    def compensate(self, columns: "Tensor", upper: "Tensor") -> "tuple[Parts, Tensor]":
        """Round C columns one after the other, each error carried into all columns behind it.

        Args:
            columns: what is left of the weights, float32 [M, N, C], C a multiple of 16.
            upper: of these columns, float32 [M, C, C]; see `compensated.Factor`.

        Returns:
            Codes, and errors over the diagonal of `upper`, float32 [M, N, C].
        """

    @abstractmethod
    def decode(self, parts: Parts) -> "Tensor":
        """The BF16 numbers [M, N, K] that an engine multiplies with."""

    def of(self, matrices: slice) -> Self:
        """The coder of some matrices."""
        return replace(self, scale=self.scale[matrices])

    def repeated(self, times: int) -> Self:
        """The coder of all matrices, and of the same again after them."""
        return replace(self, scale=self.scale.repeat(times))


class Format(ABC):
    """How a weight, and its input, is stored and multiplied. One object each; compared by name."""

    name: ClassVar[str]
    weight_bits: ClassVar[Fraction]
    """Stored bits of a weight, scales of blocks included, per-tensor scales aside."""
    input_bits: ClassVar[int] = 16
    """Bits an input element is multiplied in; 16 where inputs stay in BF16."""
    scale_rules: ClassVar[tuple[str | None, ...]] = ()
    """How scales of a weight may be chosen at the same bits, the default first; None is not
    written."""
    roundings: ClassVar[tuple[str, ...]] = (NEAREST,)
    """How codes may be chosen at the same bits, the default first."""
    tensor_scale: ClassVar[str] = ""
    """The part with the scale of a whole weight; empty for a format without one."""
    inputs: ClassVar[tuple[str | None, ...]] = (None,)
    """Inputs that the format allows besides its own, its own (None) first."""
    kept_codes: ClassVar[str] = ""
    """Dtype, as safetensors names it, of the codes in a source that `CAST` keeps."""
    layouts: ClassVar[Mapping[str, LayoutForm]] = {}
    """How checkpoints hold it, by layout; empty for a format that cannot be exported."""

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<format {self.name}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def label(self) -> str:
        """As people write it."""
        return self.name.upper()

    @property
    def quantizes_input(self) -> bool:
        """Whether some machine multiplies it with a quantized input."""
        return self.input_bits < 16

    def why_illegal(self, out_features: int, in_features: int) -> str | None:
        """Why a linear [out_features, in_features] cannot take the format, or None."""
        return None

    @abstractmethod
    def parts(self, out_features: int, in_features: int, choice: "Choice") -> Mapping[str, Part]:
        """What a linear stores under `choice`, by part; scales are 0-dimensional."""

    def stored_bytes(self, out_features: int, in_features: int, choice: "Choice") -> int:
        """Bytes of all tensors that a linear stores under `choice`."""
        return sum(part.bytes for part in self.parts(out_features, in_features, choice).values())

    @abstractmethod
    def encode(self, weight: "Tensor", choice: "Choice", statistics: "Statistics") -> "Packed":
        """The codes of a BF16 weight [N, K], or of experts [E, N, K] with scales of their own."""

    @abstractmethod
    def decode(self, packed: "Packed", out: "Tensor | None" = None) -> "Tensor":
        """The BF16 numbers that an engine multiplies with, [N, K] or [E, N, K]."""

    def coder(self, choice: "Choice", scale: "Tensor") -> Coder:
        """How codes are fitted to inputs under a choice that needs their moments.

        Args:
            choice: of the format.
            scale: of each of M matrices, float32 [M] on the host.
        """
        raise TypeError(f"{self} has no codes that are fitted to inputs")

    def input_scale(self, amax: float) -> float:
        """The static float32 scale that is stored for inputs of largest magnitude `amax`."""
        raise TypeError(f"{self} leaves inputs in BF16")

    def largest_input(self, scale: float) -> float:
        """The largest magnitude that inputs keep under a scale; larger ones are clipped.

        A rounding of the scale in float32 counts as nothing.
        """
        return scale / self.input_scale(1.0) * (1 + 2**-20)

    def input(self, x: "Tensor", scale: float) -> "Tensor":
        """An input [..., K] as kernels of the format see it; the shape and dtype of `x`."""
        raise TypeError(f"{self} leaves inputs in BF16")

    def needs_moments(self, choice: "Choice") -> bool:
        """Whether codes rest on second moments of the inputs, which calibration has to collect."""
        return choice.rounding != NEAREST

    def is_costly(self, choice: "Choice") -> bool:
        """Whether codes cost more to make than to read from a disk."""
        return self.needs_moments(choice)
