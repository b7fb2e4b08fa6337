"""Blocks that stay in memory elsewhere than where they are computed with.

They stay in the host's memory, of which the processes of a machine share one copy, or in that of
all their GPUs together. A process copies them from there when it needs them, without a word to the
others: the owner of a piece does not have to be at the same block.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from autoquant.decimals import gigabytes
from autoquant.errors import OutOfMemory
from autoquant.model.gpu_memory import CudaError, GpuMemory, free_unused, leave_unused
from autoquant.model.streaming.blocks import BlockReader, decoder_blocks, places_of
from autoquant.model.streaming.layout import Layout, Piece, cut, dealt
from autoquant.model.streaming.shared import HostMemory, Memory, Neighbours, allocate_together

_TRIED_BYTES = 1 << 21
"""Memory of a GPU that others map to find out whether they can."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """How many processes of a machine can keep weights on their GPUs together."""

    count: int = 1
    why_alone: str = "one process is on this machine"
    """Where it is one."""

    @classmethod
    def together(cls, device: torch.device, neighbours: Neighbours) -> Self:
        """Of the machine with the fewest: each maps memory of the others' GPUs, and reads it.

        Memory of earlier models that nothing uses any more is freed.
        """
        if device.type != "cuda":
            return cls(1, f"{device} is no GPU")
        neighbours.all_of(leave_unused)
        free_unused()
        if neighbours.fewest == 1:
            return cls()
        memory = GpuMemory(device)
        try:
            seen = allocate_together(memory, neighbours, _TRIED_BYTES)
            seen[neighbours.own].fill_(neighbours.own)
            neighbours.all_of(lambda: torch.cuda.synchronize(device))
            numbers = [int(other[-1]) for other in seen]
        except CudaError as error:
            return cls(1, f"GPUs of this machine cannot map each other's memory: {error}")
        expected = list(range(len(neighbours)))
        if any(neighbours.peers.all_of(lambda: numbers != expected)):
            return cls(1, "GPUs of this machine read something else than others have written")
        return cls(neighbours.fewest)


class KeptBlocks:
    """The blocks of a model in memory of a machine's processes; `on_host` and `on_gpus` make it.

    Args:
        layouts: of the blocks.
        pieces: of each block, in the order of its bytes.
        memory: the kind of memory that they are in.
        memories: of each process, uint8, on the host or on GPUs.
        own: the number of this process among them.
        device: where a block is computed with.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        pieces: Sequence[Sequence[Piece]],
        memory: Memory,
        memories: Sequence[Tensor],
        *,
        own: int,
        device: torch.device,
    ) -> None:
        self._layouts = layouts
        self._pieces = pieces
        self._memory = memory  # which is mapped as long as it lives
        self._memories = memories
        self._own = own
        self._device = device

    @classmethod
    def allocated(
        cls,
        layouts: Sequence[Layout],
        pieces: Sequence[Sequence[Piece]],
        memory: Memory,
        neighbours: Neighbours,
        device: torch.device,
    ) -> Self:
        """Memory for blocks, without their content."""
        own = neighbours.own
        size = sum(piece.size for block in pieces for piece in block if piece.owner == own)
        memories = allocate_together(memory, neighbours, size)
        return cls(layouts, pieces, memory, memories, own=own, device=device)

    def fill(self, reader: BlockReader, neighbours: Neighbours) -> None:
        """Read the blocks: each process every n-th one, all of its pieces.

        Raises:
            SourceError: a weight cannot be read.
        """

        def read_own() -> None:
            for block in range(self._own, len(self._layouts), len(neighbours)):
                self._write(block, reader.read(block))
            if self._memories[self._own].is_cuda:
                torch.cuda.synchronize(self._device)  # others read it from now on

        neighbours.all_of(read_own)

    def read(self, block: int) -> Mapping[str, Tensor]:
        """The tensors of a block: on the device, or where they lie on a CPU."""
        layout, parts = self._layouts[block], self._parts(block)
        if len(parts) == 1 and self._device.type == "cpu":
            return layout.views(parts[0])
        whole = torch.empty(layout.size, dtype=torch.uint8, device=self._device)
        slots = whole.split([len(part) for part in parts])
        for number in self._in_turn(len(parts)):
            slots[number].copy_(parts[number], non_blocking=True)
        return layout.views(whole)

    def stored_bytes(self, block: int) -> int:
        """What is brought of a block from elsewhere than this process's device."""
        return sum(
            piece.size
            for piece in self._pieces[block]
            if piece.owner != self._own or not self._memories[piece.owner].is_cuda
        )

    def _write(self, block: int, content: Mapping[str, Tensor]) -> None:
        layout, parts = self._layouts[block], self._parts(block)
        if len(parts) == 1 and not parts[0].is_cuda:
            layout.fill(parts[0], content)
            return
        whole = torch.empty(layout.size, dtype=torch.uint8, device=self._device)
        layout.fill(whole, content)
        for part, slot in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.copy_(slot)

    def pin(self) -> None:
        """Let a GPU copy from the host's memory at full speed, as long as this object lives.

        It is pinned where it lies: PyTorch's own pinned memory comes in powers of two.

        Raises:
            OutOfMemory: the driver refuses to.
        """
        runtime: Any = torch.cuda.cudart()
        for memory in self._memories:
            if len(memory) == 0:
                continue
            code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
            if code != 0:
                raise OutOfMemory(
                    f"{gigabytes(memory.nbytes)} of the host's memory cannot be pinned "
                    f"(cudaHostRegister: error {code}).",
                    fix="--weights disk pins nothing; or give the process more memory to lock.",
                )
            weakref.finalize(self, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False

    def _parts(self, block: int) -> list[Tensor]:
        return [piece.of(self._memories) for piece in self._pieces[block]]

    def _in_turn(self, count: int) -> Iterator[int]:
        """The next process's piece first, and one's own last: processes that are at the same block
        do not all ask the same one.
        """
        return ((self._own + 1 + number) % count for number in range(count))


def on_host(
    model: Any, reader: BlockReader, device: torch.device, neighbours: Neighbours
) -> KeptBlocks:
    """The blocks in the host's memory, each read by one process and mapped by all.

    Raises:
        SourceError: a weight cannot be read.
        OutOfMemory: memory that a GPU copies from cannot be pinned.
    """
    layouts = _layouts(model)
    pieces = dealt(layouts, len(neighbours))
    kept = KeptBlocks.allocated(layouts, pieces, HostMemory(), neighbours, device)
    kept.fill(reader, neighbours)
    if device.type == "cuda":
        kept.pin()
    return kept


def on_gpus(
    model: Any, reader: BlockReader, device: torch.device, neighbours: Neighbours
) -> KeptBlocks:
    """The blocks on the GPUs of all processes, cut into equal pieces.

    Raises:
        SourceError: a weight cannot be read.
        OutOfMemory: a GPU has less memory than it said.
    """
    layouts = _layouts(model)
    pieces = cut(layouts, len(neighbours))
    try:
        kept = KeptBlocks.allocated(layouts, pieces, GpuMemory(device), neighbours, device)
    except CudaError as error:
        raise OutOfMemory(
            f"{gigabytes(sum(layout.size for layout in layouts))} of blocks cannot be kept on "
            f"{len(neighbours)} GPUs: {error}.",
            fix="--weights host keeps them in the host's memory, --weights disk in the files.",
        ) from error
    kept.fill(reader, neighbours)
    return kept


def _layouts(model: Any) -> list[Layout]:
    return [Layout.of(places_of(model, block)) for block in decoder_blocks(model)]
