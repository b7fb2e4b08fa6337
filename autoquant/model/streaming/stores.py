"""Where the weights of blocks are while they are not computed with.

A store brings the weights of a block into the model and takes them out again. What a model
computes does not depend on its store.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from autoquant.model.streaming.blocks import BlockReader, decoder_blocks, places_of, require_finite


@dataclass(slots=True)
class Brought:
    """What a store has brought from other GPUs, the host's memory or the disk so far."""

    blocks: int = 0
    bytes: int = 0
    """As they are stored there."""
    waited: float = 0.0
    """Seconds in which a block was needed that had not come."""


class BlockSource(Protocol):
    """Where blocks stay; a `BlockReader` is one, of files."""

    def read(self, block: int) -> Mapping[str, Tensor]:
        """The tensors of a block by the model's names, on the device or on the host."""

    def stored_bytes(self, block: int) -> int:
        """What is brought for it."""


class BlockStore(Protocol):
    """Brings the weights of blocks into a model."""

    is_streamed: bool
    """Whether a block's weights leave the device again."""
    brought: Brought

    def open(self, block: int) -> None:
        """Bring a block's weights; those of another may leave."""

    def settle(self) -> None:
        """Wait for what is on its way, so that memory changes no more until a block is opened."""


class Resident:
    """All weights are on the device.

    Args:
        model: without the content of its blocks, which is put in.
        reader: of that content.
        device: where it goes.

    Raises:
        SourceError: a weight is not finite, or cannot be read.
    """

    is_streamed = False

    def __init__(self, model: Any, reader: BlockReader, device: torch.device) -> None:
        self.brought = Brought()
        for number, block in enumerate(decoder_blocks(model)):
            content = {n: t.to(device) for n, t in reader.read(number).items()}
            require_finite(content)
            for place in places_of(model, block):
                place.put(content[place.full_name])

    def open(self, block: int) -> None:
        """Everything is there already."""

    def settle(self) -> None:
        """Nothing is on its way."""


class Streamed:
    """One block at a time is in the model, and the next one is on its way in a thread.

    Args:
        model: without the content of its blocks.
        source: of that content.
        device: where it goes.
    """

    is_streamed = True

    def __init__(self, model: Any, source: BlockSource, device: torch.device) -> None:
        self.brought = Brought()
        self._source = source
        self._device = device
        self._places = [places_of(model, block) for block in decoder_blocks(model)]
        self._empty = [[place.tensor for place in places] for places in self._places]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="autoquant-blocks")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._checked: set[int] = set()
        self._present: int | None = None
        self._coming: tuple[int, Future[Mapping[str, Tensor]]] | None = None

    def open(self, block: int) -> None:
        """Bring a block's weights, and begin to fetch those of the block behind it.

        Raises:
            SourceError: a weight is not finite, or cannot be read.
        """
        before = self._present
        if block == before:
            return
        asked = time.monotonic()
        content = self._arrived(block)
        self.brought.waited += time.monotonic() - asked
        if block not in self._checked:
            require_finite(content)
            self._checked.add(block)
        self._remove()
        for place in self._places[block]:
            place.put(content[place.full_name])
        self._present = block
        after = block + (-1 if before is not None and before == block + 1 else 1)
        if 0 <= after < len(self._places):
            self._coming = after, self._thread.submit(self._fetched, after)

    def settle(self) -> None:
        """Wait for the block that is on its way; what ends it is raised when it is opened."""
        if self._coming is not None:
            wait([self._coming[1]])

    def _arrived(self, block: int) -> Mapping[str, Tensor]:
        """The content of a block on the device; what comes instead of it is dropped."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == block:
            return coming[1].result()
        if coming is not None and not coming[1].cancel():
            coming[1].exception()
        del coming
        return self._thread.submit(self._fetched, block).result()

    def _remove(self) -> None:
        """Take the present block out of the model, when nothing computes with it any more."""
        if self._present is None:
            return
        if self._copies is not None:
            torch.cuda.current_stream(self._device).synchronize()
        for place, empty in zip(
            self._places[self._present], self._empty[self._present], strict=True
        ):
            place.put(empty)
        self._present = None

    def _fetched(self, block: int) -> Mapping[str, Tensor]:
        """In the thread: the content of a block on the device."""
        self.brought.blocks += 1
        self.brought.bytes += self._source.stored_bytes(block)
        if self._copies is None:
            return self._source.read(block)
        with torch.cuda.stream(self._copies):
            content = self._source.read(block)
            copied = {
                name: tensor.to(self._device, non_blocking=True) for name, tensor in content.items()
            }
        self._copies.synchronize()
        return copied
