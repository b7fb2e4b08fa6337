"""Codes in memory: what a checkpoint stores for a weight, and what it is computed from.

Shapes: N outputs, K inputs, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoquant.formats.choice import Choice
from autoquant.formats.moments import Moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What is known of a weight and its inputs when it is encoded."""

    weight_amax: Tensor
    """Largest magnitude over the weight's scale set: float32 on the CPU, 0-dimensional, or [E]."""
    moments: Moments | None = None
    """Of the inputs, on the device of the weight; for choices that need them."""
    drift: Moments | None = None
    """E[(x - z) z^T] of inputs z behind quantized blocks and x of the BF16 model, for weights that
    are refitted; the moments are those of z then."""
    rows: tuple[int, ...] = ()
    """Of each linear that every matrix joins, where there are moments."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The codes of one weight [N, K], or of the experts [E, N, K] of one product."""

    choice: Choice
    parts: Mapping[str, Tensor]
    """Tensors by part. Codes and block scales begin with [N, ...] or [E, N, ...]; per-tensor
    scales are 0-dimensional, or [E]."""
    experts: int | None = None
    """E; None for a single weight."""
    plain: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """After `encode`: why a linear has the codes of the weight alone instead of those fitted to
    its inputs, by its matrix and place there."""

    @property
    def bytes(self) -> int:
        """Memory of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def decode(self, out: Tensor | None = None) -> Tensor:
        """The BF16 numbers that an engine multiplies with; see `Format.decode`."""
        return self.choice.format.decode(self, out)

    def of_expert(self, index: int) -> "Packed":
        """The codes of one expert; views, no copies."""
        assert self.experts is not None
        return Packed(self.choice, {name: part[index] for name, part in self.parts.items()})

    def of_rows(self, start: int, stop: int) -> "Packed":
        """The codes of some rows of a single weight; views, no copies."""
        assert self.experts is None
        rows = {n: part[start:stop] if part.ndim else part for n, part in self.parts.items()}
        return Packed(self.choice, rows)

    @classmethod
    def joined(cls, parts: Sequence["Packed"]) -> "Packed":
        """Weights of one scale set as one, row after row; the inverse of `of_rows`."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        return cls(
            first.choice,
            {
                name: torch.cat([p.parts[name] for p in parts]) if part.ndim else part
                for name, part in first.parts.items()
            },
        )

    @classmethod
    def stacked(cls, parts: Sequence["Packed"]) -> "Packed":
        """Experts as one; the inverse of `of_expert`."""
        first = parts[0]
        names = first.parts
        stacks = {name: torch.stack([p.parts[name] for p in parts]) for name in names}
        return cls(first.choice, stacks, experts=len(parts))

    def to(self, device: torch.device) -> "Packed":
        """The same codes with the large parts on `device`; per-tensor scales stay on the host."""
        least = 1 if self.experts is None else 2
        moved = {n: p.to(device) if p.ndim >= least else p for n, p in self.parts.items()}
        return Packed(self.choice, moved, self.experts)
