"""How the inputs of a block's weights drift behind quantized blocks.

Shapes: R rows that a weight multiplies, K inputs.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from autoquant.codes.statistics import DriftStatistics
from autoquant.measure.statistics.sums import Sums
from autoquant.measure.statistics.taps import InputTaps
from autoquant.model.live import QuantizedModel
from autoquant.plan.linears import LayerGroup

_Rows = tuple[Tensor, Tensor | None]
"""Rows [R, K] and the token of each, as `taps.See` takes them."""


class DriftWatch:
    """Pairs what weights multiply in the BF16 model and what they multiply behind quantized blocks.

    A row of an expert has a partner where the BF16 model sends the same token to it; without one it
    counts as not drifted.

    Args:
        quantized: the live model.
        group: whose inputs are watched.
        sets: those of its input sets that are; all by default.
    """

    def __init__(
        self, quantized: QuantizedModel, group: LayerGroup, sets: Collection[str] | None = None
    ) -> None:
        self.held_out = False
        self.is_bf16 = True
        """Whether the forward inside the taps is the BF16 model's, which comes first."""
        self.taps = InputTaps(quantized, [group], self._see)
        shapes = {name: self.taps.sets[name] for name in sets or self.taps.sets}
        self._moments = {name: Sums.zeros(shape) for name, shape in shapes.items()}
        self._drift = {name: Sums.zeros(shape) for name, shape in shapes.items()}
        self._partners: dict[tuple[str, int], _Rows] = {}

    def statistics(self) -> DriftStatistics:
        """Of every input set."""
        return DriftStatistics(
            {name: own.moments() for name, own in self._moments.items()},
            {name: own.moments() for name, own in self._drift.items()},
        )

    def _see(self, name: str, matrix: int, rows: Tensor, tokens: Tensor | None) -> None:
        if name not in self._moments:
            return
        if self.is_bf16:
            self._partners[name, matrix] = rows, tokens
            return
        own, part = rows.float(), int(self.held_out)
        partner = _partner_of((own, tokens), self._partners.get((name, matrix)))
        self._moments[name].add(own, own, part, matrix)
        self._drift[name].add(partner - own, own, part, matrix)


def _partner_of(own: _Rows, other: _Rows | None) -> Tensor:
    """The row of the other forward for each row [R, K], the row itself where there is none."""
    rows, tokens = own
    if other is None or not len(other[0]):
        return rows
    others, of_tokens = other
    if tokens is None or of_tokens is None:
        return others.float() if others.shape == rows.shape else rows
    at = torch.searchsorted(of_tokens, tokens).clamp(max=len(of_tokens) - 1)
    return torch.where((of_tokens[at] == tokens)[:, None], others[at].float(), rows)
