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


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScale:
    """The static scale of one input set: from a calibrated range, or as a checkpoint stores it."""

    amax: float | None = None
    """Largest magnitude of the calibration inputs."""
    stored: float | None = None

    def of(self, format: Format) -> float:
        """The float32 scale for inputs of `format`."""
        if self.stored is not None:
            return self.stored
        assert self.amax is not None
        return format.input_scale(self.amax)


@dataclass(slots=True)
class InputSet:
    """The state of one input scale set in a live model."""

    name: str
    scale: InputScale | None = None
    observed: float | None = None
    """Largest magnitude seen while observing."""
    observing: bool = False
    _seen: torch.Tensor | None = field(default=None, repr=False)
    _quantized: dict[Format, torch.Tensor] = field(default_factory=dict, repr=False)

    def quantize(self, x: torch.Tensor, format: Format) -> torch.Tensor:
        """`x` as the quantized kernels of `format` see it; computed once per tensor and format."""
        if x is not self._seen:
            self.forget()
            self._seen = x
        if format not in self._quantized:
            assert self.scale is not None, f"{self.name} was not calibrated"
            self._quantized[format] = format.input(x, self.scale.of(format))
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

    def forget(self) -> None:
        """Drop the tensors of the last forward."""
        self._seen = None
        self._quantized.clear()


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
