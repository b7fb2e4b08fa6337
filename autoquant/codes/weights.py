"""Where the weights of a block come from.

A `WeightSource` gives the tensors of one block for as long as they are needed. The live model is
one (`autoquant.model.live_weights`); the files of a checkpoint are another.

Shapes: N outputs, K inputs, E experts.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from autoquant.plan.linears import LayerGroup, Linear
from autoquant.source.headers import Headers
from autoquant.source.tensors import read_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Weights that a source holds as one tensor, and that are encoded in one call."""

    name: str
    """The checkpoint's name of the first linear, or of the experts and their product."""
    layer: int | None
    """The block that it belongs to."""
    matrices: tuple[tuple[Linear, ...], ...]
    """The linears whose rows each matrix joins. One matrix is a tensor [N, K]; several are the
    experts [E, N, K] of one product."""
    is_stack: bool = False
    """Whether the tensor has the axis of experts."""
    origin: str = "the model in memory"
    """Where the weights are, for people."""

    @property
    def scale_sets(self) -> tuple[str, ...]:
        """The weight scale set of each matrix."""
        return tuple(matrix[0].weight_scale_set for matrix in self.matrices)


class Block(Protocol):
    """The weights of one block while it is open."""

    def weight(self, unit: Unit) -> Tensor:
        """The BF16 weight of a unit of the block, [N, K] or [E, N, K]; read-only."""


class WeightSource(Protocol):
    """Gives the weights of blocks, and takes them back."""

    def units(self, group: LayerGroup) -> tuple[Unit, ...]:
        """How the source holds a group's weights."""

    def block(self, layer: int | None) -> AbstractContextManager[Block]:
        """The weights of a block, or of what is outside of all, for the time of a `with` block."""

    def device(self, unit: Unit) -> torch.device:
        """Where the unit is multiplied with."""


class FileWeights:
    """The weights of a checkpoint's files, read one at a time.

    Args:
        headers: where the tensors are.
    """

    def __init__(self, headers: Headers) -> None:
        self._headers = headers

    def units(self, group: LayerGroup) -> tuple[Unit, ...]:
        """Every linear by itself."""
        return tuple(
            Unit(
                name=linear.name,
                layer=group.layer,
                matrices=((linear,),),
                origin=self._headers[linear.tensor].file.name,
            )
            for linear in group.linears
        )

    @contextmanager
    def block(self, layer: int | None) -> Iterator[Block]:
        """Nothing is read before a weight is asked for."""
        yield self

    def device(self, unit: Unit) -> torch.device:
        """The processor's memory."""
        return torch.device("cpu")

    def weight(self, unit: Unit) -> Tensor:
        """The weight in BF16, the precision that it is scored in.

        Raises:
            SourceError: the file has become shorter or unreadable.
        """
        ((linear,),) = unit.matrices
        return read_tensor(self._headers[linear.tensor]).to(torch.bfloat16)
