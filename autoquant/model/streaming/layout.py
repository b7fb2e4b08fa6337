"""Where the tensors of a block lie in one piece of memory, and how that may be cut."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from autoquant.model.streaming.blocks import Place

_ALIGNMENT = 512
"""Bytes; a tensor begins at a multiple, as those of PyTorch's allocators do."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where one tensor is."""

    start: int
    size: int
    """Bytes."""
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a block, one behind the other."""

    tensors: Mapping[str, _Stored]
    size: int
    """Bytes of the whole block, a multiple of the alignment."""

    @classmethod
    def of(cls, places: Iterable[Place]) -> Self:
        """Of tensors that are there, or on the meta device."""
        stored: dict[str, _Stored] = {}
        end = 0
        for place in places:
            tensor = place.tensor
            stored[place.full_name] = _Stored(end, tensor.nbytes, tensor.shape, tensor.dtype)
            end += _aligned(tensor.nbytes)
        return cls(stored, end)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors in the memory [size] of a block, uint8."""
        return {
            name: memory[own.start : own.start + own.size].view(own.dtype).view(own.shape)
            for name, own in self.tensors.items()
        }

    def fill(self, memory: Tensor, content: Mapping[str, Tensor]) -> None:
        """Write tensors of these shapes and dtypes into the memory [size] of a block, uint8.

        Raises:
            RuntimeError: one of them has another size.
        """
        for name, own in self.tensors.items():
            flat = content[name].contiguous().view(-1).view(torch.uint8)
            memory[own.start : own.start + own.size].copy_(flat)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a block, or all of it, in the memory of one process."""

    owner: int
    start: int
    """In the owner's memory."""
    size: int
    """Bytes."""

    def of(self, memories: Sequence[Tensor]) -> Tensor:
        """The piece, uint8, given the memory of every process."""
        return memories[self.owner][self.start : self.start + self.size]


def dealt(layouts: Iterable[Layout], processes: int) -> list[tuple[Piece, ...]]:
    """Each block as one piece, in the memory of one process after the other."""
    sizes = (
        [layout.size if block % processes == process else 0 for process in range(processes)]
        for block, layout in enumerate(layouts)
    )
    return list(_placed(sizes, processes))


def cut(layouts: Iterable[Layout], processes: int) -> list[tuple[Piece, ...]]:
    """Each block in equal pieces, one in the memory of every process.

    So every GPU sends and receives as much as the others, whatever block they are at, and holds
    the same share of the model.
    """
    return list(_placed((_cut(layout.size, processes) for layout in layouts), processes))


def _cut(size: int, pieces: int) -> list[int]:
    most = _aligned(-(-size // pieces))
    return [min(most, max(0, size - number * most)) for number in range(pieces)]


def _placed(sizes: Iterable[list[int]], processes: int) -> Iterator[tuple[Piece, ...]]:
    """The pieces of blocks, in the order of their bytes, one behind the other in each memory.

    Args:
        sizes: of each block, what each process has of it.
        processes: how many there are.
    """
    ends = [0] * processes
    for own in sizes:
        yield tuple(Piece(n, ends[n], size) for n, size in enumerate(own) if size)
        ends = [end + size for end, size in zip(ends, own, strict=True)]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
