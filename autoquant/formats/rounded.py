"""Codes of several matrices in one format, and what they do to products.

Shapes: M matrices with scales of their own, each of L linears one below the other, N outputs,
K inputs, B blocks of 16 of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.formats.base import Parts


@dataclass(frozen=True, slots=True)
class Rounded:
    """Codes of M matrices."""

    parts: Parts
    """Those that a weight has for each of its rows, by their names: [M, N, ...], a byte an element,
    as many for each block of 16 columns."""

    def where(self, chosen: Tensor, other: "Rounded") -> "Rounded":
        """These codes of the rows that are `chosen` [M, N], the other's of the rest."""
        own = chosen[:, :, None]
        return _of_bytes(lambda ours, theirs: torch.where(own, ours, theirs), [self, other])

    def parted(self, count: int) -> list["Rounded"]:
        """As many parts of equally many matrices; the inverse of `joined`."""
        chunks = {name: part.chunk(count) for name, part in self.parts.items()}
        return [Rounded({name: own[i] for name, own in chunks.items()}) for i in range(count)]

    @classmethod
    def joined(cls, parts: Sequence["Rounded"]) -> "Rounded":
        """One matrix after the other."""
        return _of_bytes(lambda *own: torch.cat(own), parts)

    @classmethod
    def of_columns(cls, parts: Sequence["Rounded"]) -> "Rounded":
        """Columns of the same rows beside each other."""
        return _of_bytes(lambda *own: torch.cat(own, dim=2), parts)

    def in_order(self, place: Tensor) -> "Rounded":
        """The blocks of columns in another order; `place` [M, B] says where each is."""

        def moved(part: Tensor) -> Tensor:
            blocks = part.view(*part.shape[:2], place.shape[1], -1)
            at = place[:, None, :, None].expand_as(blocks)
            return blocks.gather(2, at).view_as(part)

        return _of_bytes(moved, [self])

    def first(self, inputs: int, of: int) -> "Rounded":
        """The first of `of` columns, where these are whole parts of every part."""
        sizes = {name: part.shape[2] * inputs // of for name, part in self.parts.items()}
        return Rounded({name: part[..., : sizes[name]] for name, part in self.parts.items()})


def _of_bytes(made: Callable[..., Tensor], codes: Sequence[Rounded]) -> Rounded:
    """What is made of the same part of several codes, as bytes: not all can be done to float8."""
    return Rounded(
        {
            name: made(*(own.parts[name].view(torch.uint8) for own in codes)).view(part.dtype)
            for name, part in codes[0].parts.items()
        }
    )


def harm(
    weight: Tensor,
    decoded: Tensor,
    moments: Tensor,
    rows: Sequence[int],
    pull: Tensor | None = None,
) -> Tensor:
    """tr(D H D^T) of each linear, D the error of the weights that engines multiply with.

    With a pull P, tr(D H D^T + 2 P D^T): the mean of |W x - (W - D) z|^2 over inputs z that have
    drifted from x, less what no code changes.

    Args:
        weight: BF16 [M, N, K].
        decoded: what its codes stand for, BF16 [M, N, K].
        moments: H, the mean x x^T of the inputs, float32 [M, K, K].
        rows: of each of the L linears; N in all.
        pull: W E[(x - z) z^T], float32 [M, N, K].

    Returns:
        Mean squared error of the products, summed over their outputs: float64 [M, L].
    """
    error = weight.float() - decoded.float()
    slope = error @ moments if pull is None else error @ moments + 2 * pull
    of_rows = (slope * error).sum(dim=2).double()
    return torch.stack([part.sum(dim=1) for part in of_rows.split(list(rows), dim=1)], dim=1)
