"""Inputs of quantized linears: calibrated ranges, shared fake quantization.

An input scale set is what several linears read together (q, k and v; gate and up; the wide
products of all experts): one static scale, and one fake quantization per forward for all of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from autoquant.errors import SourceError
from autoquant.formats import Format
from autoquant.source import names as table

BLOCK = 16
"""Adjacent channels that share a scale where inputs are quantized to four bits."""

SMALL_SHARE = 0.01
"""Blocks that may be smaller than what `InputRange.small` says, of those that are not zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScale:
    """The static scale of one input set: from a calibrated range, or as a checkpoint stores it."""

    amax: float | None = None
    """Largest magnitude that it holds."""
    stored: float | None = None

    def of(self, format: Format) -> float:
        """The float32 scale for inputs of `format`."""
        if self.stored is not None:
            return self.stored
        assert self.amax is not None
        return format.input_scale(self.amax)


@dataclass(slots=True)
class Clips:
    """What forwards clip of their inputs, by input set."""

    elements: dict[str, int] = field(default_factory=dict)
    """Input elements that were quantized."""
    clipped: dict[str, torch.Tensor] = field(default_factory=dict)
    """How many of them were beyond what the scale holds, int64 on the device."""

    def add(self, name: str, x: torch.Tensor, largest: float) -> None:
        """Count an input of a set whose scale holds magnitudes up to `largest`."""
        beyond, before = (x.abs() > largest).sum(), self.clipped.get(name)
        self.clipped[name] = beyond if before is None else before + beyond
        self.elements[name] = self.elements.get(name, 0) + x.numel()

    def counted(self) -> dict[str, tuple[int, int]]:
        """Elements of each set that were beyond its scale, and all of them."""
        beyond = torch.stack([*self.clipped.values()]).tolist() if self.clipped else []
        return {
            name: (clipped, elements)
            for (name, elements), clipped in zip(self.elements.items(), beyond, strict=True)
        }


@dataclass(slots=True)
class InputSet:
    """The state of one input scale set in a live model."""

    name: str
    scale: InputScale | None = None
    observed: float | None = None
    """Largest magnitude seen while observing."""
    observing: bool = False
    sizes: torch.Tensor | None = field(default=None, repr=False)
    """Blocks seen while observing by the exponent of their largest magnitude, int64 [E]."""
    _seen: torch.Tensor | None = field(default=None, repr=False)
    _quantized: dict[Format, torch.Tensor] = field(default_factory=dict, repr=False)

    def quantize(self, x: torch.Tensor, format: Format, clips: Clips | None = None) -> torch.Tensor:
        """`x` as the quantized kernels of `format` see it; computed once per tensor and format, and
        counted then.
        """
        if x is not self._seen:
            self.forget()
            self._seen = x
        if format not in self._quantized:
            assert self.scale is not None, f"{self.name} was not calibrated"
            scale = self.scale.of(format)
            if clips is not None:
                clips.add(self.name, x, format.largest_input(scale))
            self._quantized[format] = format.input(x, scale)
        return self._quantized[format]

    def observe(self, x: torch.Tensor) -> None:
        """Widen the range by `x`.

        Raises:
            SourceError: NaN or Inf reached this input in BF16.
        """
        if x is self._seen or x.numel() == 0:
            return
        self._seen = x
        lowest, highest = torch.aminmax(x)
        largest = torch.maximum(-lowest, highest).item()
        if not largest < float("inf"):
            raise SourceError(
                f"the input of {self.name} holds NaN or Inf in BF16 on the calibration text.",
                fix="check the weights of the layers before it; no scale can hold such a range.",
            )
        self.observed = max(largest, self.observed or 0.0)
        if x.shape[-1] % BLOCK == 0:
            sizes = _blocks_by_exponent(x)
            self.sizes = sizes if self.sizes is None else self.sizes + sizes

    def forget(self) -> None:
        """Drop the tensors of the last forward."""
        self._seen = None
        self._quantized.clear()


_EXPONENTS = 160
"""More than the exponents of float32 have on either side of zero."""


def _blocks_by_exponent(x: torch.Tensor) -> torch.Tensor:
    """Numbers of blocks that are not zero by the exponent of their largest magnitude, int64.

    Magnitudes from 2^(e - 1) to 2^e count at the place `e + _EXPONENTS`.
    """
    largest = x.detach().unflatten(-1, (-1, BLOCK)).abs().amax(dim=-1).float().flatten()
    exponents = torch.frexp(largest[largest > 0]).exponent
    return torch.bincount(exponents + _EXPONENTS, minlength=2 * _EXPONENTS)


def small_of(sizes: torch.Tensor) -> float | None:
    """A power of two that the largest magnitude of 99 blocks of 100 is not below.

    Args:
        sizes: blocks by the exponent of their largest magnitude, as `InputSet` counts them.
    """
    total = int(sizes.sum())
    if not total:
        return None
    fewer = sizes.cumsum(0) <= SMALL_SHARE * total
    return 2.0 ** (int(fewer.sum()) - _EXPONENTS - 1)


def fill_unseen(observed: Mapping[str, float | None]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Ranges for every set: a set that no token reached takes its block's largest.

    Returns:
        The complete ranges, and the names of the sets that no calibration token reached.
    """
    unseen = tuple(name for name, amax in observed.items() if amax is None)
    return {
        name: amax if amax is not None else _largest_beside(name, observed)
        for name, amax in observed.items()
    }, unseen


def _largest_beside(name: str, observed: Mapping[str, float | None]) -> float:
    match = table.LAYER.fullmatch(name)
    beside = f"{match['layer']}." if match else name
    return _largest(a for n, a in observed.items() if n.startswith(beside)) or (
        _largest(observed.values()) or 1.0
    )


def _largest(ranges: Iterable[float | None]) -> float:
    return max((amax for amax in ranges if amax is not None), default=0.0)
