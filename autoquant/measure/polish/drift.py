"""How the inputs of a block's weights drift behind quantized blocks.

Shapes: R rows that a weight multiplies, K inputs.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.codes.row_weights import RowWeights
from autoquant.codes.statistics import DriftStatistics
from autoquant.measure.statistics.chunks import Chunk
from autoquant.measure.statistics.moments import roots_of
from autoquant.measure.statistics.sums import Sums
from autoquant.measure.statistics.taps import InputTaps
from autoquant.model.live import QuantizedModel
from autoquant.plan.linears import LayerGroup


class DriftWatch:
    """Pairs what weights multiply in the BF16 model and what they multiply behind quantized blocks.

    A row of an expert has a partner where the BF16 model sends the same token to it; without one it
    counts as not drifted, and with the mean weight.

    Args:
        quantized: the live model.
        group: whose inputs are watched.
        sets: those of its input sets that are.
        weights: of the rows of the BF16 model, by input set; others count alike.
        chunk: the first that they see.
    """

    def __init__(
        self,
        quantized: QuantizedModel,
        group: LayerGroup,
        sets: Collection[str],
        weights: Mapping[str, RowWeights],
        chunk: Chunk,
    ) -> None:
        self._chunk = chunk
        self._is_bf16 = True
        self.taps = InputTaps(quantized, [group], self._see)
        self._weights = weights
        shapes = {name: self.taps.sets[name] for name in sets}
        self._moments = {name: Sums.zeros(shape) for name, shape in shapes.items()}
        self._drift = {name: Sums.zeros(shape) for name, shape in shapes.items()}
        self._partners: dict[tuple[str, int], _Partners] = {}

    def sees_bf16(self, chunk: Chunk) -> None:
        """Whatever the taps see next are the BF16 model's rows of some sequences."""
        self._chunk, self._is_bf16 = chunk, True
        self._partners.clear()

    def sees_polished(self) -> None:
        """Whatever the taps see next are rows of the same sequences behind quantized blocks."""
        self._is_bf16 = False

    def statistics(self) -> DriftStatistics:
        """Of every input set."""
        return DriftStatistics(
            {name: own.moments() for name, own in self._moments.items()},
            {name: own.moments() for name, own in self._drift.items()},
        )

    def _see(self, name: str, matrix: int, rows: Tensor, tokens: Tensor | None) -> None:
        if name not in self._moments:
            return
        chunk, own = self._chunk, rows.float()
        sizes = chunk.sizes(len(rows), tokens)
        if self._is_bf16:
            roots = roots_of(self._weights.get(name), chunk, matrix, sizes, rows)
            self._partners[name, matrix] = _Partners(own, roots, tokens)
            return
        drift, roots = _paired(own, tokens, self._partners.get((name, matrix)))
        weighed, drifted = (chunk.parted(each * roots, sizes) for each in (own, drift))
        for (part, left), (_, other) in zip(weighed, drifted, strict=True):
            self._moments[name].add(left, left, part, matrix)
            self._drift[name].add(other, left, part, matrix)


@dataclass(frozen=True, slots=True)
class _Partners:
    """What one matrix multiplies in the BF16 model's forward of a chunk."""

    rows: Tensor
    """float32 [R, K]."""
    roots: Tensor
    """Of their weights, float32 [R, 1]."""
    tokens: Tensor | None
    """As `taps.See` takes them."""


def _paired(own: Tensor, tokens: Tensor | None, other: _Partners | None) -> tuple[Tensor, Tensor]:
    """The drift of rows [R, K] from their partners, and the roots of the weights [R, 1] of these;
    zeros and ones where there are none.
    """
    nothing, ones = torch.zeros_like(own), own.new_ones(len(own), 1)
    if other is None or not len(other.rows):
        return nothing, ones
    if tokens is None or other.tokens is None:
        is_same = other.rows.shape == own.shape
        return (other.rows - own, other.roots) if is_same else (nothing, ones)
    at = torch.searchsorted(other.tokens, tokens).clamp(max=len(other.tokens) - 1)
    is_there = (other.tokens[at] == tokens)[:, None]
    drift = torch.where(is_there, other.rows[at] - own, nothing)
    return drift, torch.where(is_there, other.roots[at], ones)
