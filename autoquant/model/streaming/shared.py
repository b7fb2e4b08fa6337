"""Blocks in the memory of a machine once, for all processes that measure on it.

Each process reads its share of the blocks, and all map what the others have read. The memory has no
name: it is gone when the last process is.
"""

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from autoquant.model.streaming.blocks import BlockReader

_T = TypeVar("_T")

_PAGE = mmap.PAGESIZE
"""Bytes; a tensor begins at a page, which is what memory is pinned by."""


class Peers(Protocol):
    """The processes of a run, on one machine or several."""

    number: int
    """Of this process."""

    def all_of(self, work: Callable[[], _T]) -> list[_T]:
        """What each process makes, in their order."""


class _Alone:
    """A process without others."""

    number = 0

    def all_of(self, work: Callable[[], _T]) -> list[_T]:
        return [work()]


ALONE = _Alone()


def can_share() -> bool:
    """Whether processes of this machine can map each other's memory."""
    return hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor is in memory that its owner has read it into."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Share:
    """The blocks that one process has read."""

    process: int
    descriptor: int
    size: int
    blocks: Mapping[int, Mapping[str, _Stored]]


def read_blocks(reader: BlockReader, peers: Peers) -> dict[int, Mapping[str, Tensor]]:
    """The content of every block in the host's memory, which all processes of the machine share.

    Raises:
        SourceError: a weight cannot be read.
    """
    places = peers.all_of(_machine)
    here = [number for number, place in enumerate(places) if place == places[peers.number]]
    if len(here) == 1 or not can_share():
        return {block: reader.read(block) for block in range(len(reader))}
    own = range(here.index(peers.number), len(reader), len(here))
    shares = peers.all_of(lambda: _read(reader, own))
    found: dict[int, Mapping[str, Tensor]] = {}
    peers.all_of(lambda: found.update(_mapped(shares[number] for number in here)))
    os.close(shares[peers.number].descriptor)  # all have mapped it
    return found


def _machine() -> str:
    """Names what processes must have in common to see each other's open files."""
    if not can_share():
        return ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return f"{boot.strip()} {os.readlink('/proc/self/ns/pid')}"


def _read(reader: BlockReader, blocks: range) -> _Share:
    """Read some blocks into memory that others may map."""
    descriptor = os.memfd_create("autoquant-blocks")
    stored: dict[int, dict[str, _Stored]] = {}
    end = 0
    for block in blocks:
        stored[block] = {}
        for name, tensor in reader.read(block).items():
            content = tensor.contiguous()
            os.ftruncate(descriptor, max(1, end + content.nbytes))
            _write(descriptor, content, end)
            stored[block][name] = _Stored(end, tuple(content.shape), content.dtype)
            end += -(-content.nbytes // _PAGE) * _PAGE
    return _Share(os.getpid(), descriptor, os.fstat(descriptor).st_size, stored)


def _write(descriptor: int, tensor: Tensor, start: int) -> None:
    content: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    while len(content):
        written = os.pwrite(descriptor, content, start)
        content, start = content[written:], start + written


def _mapped(shares: Iterator[_Share]) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
    for share in shares:
        if not share.blocks:
            continue
        descriptor = os.open(f"/proc/{share.process}/fd/{share.descriptor}", os.O_RDWR)
        try:
            memory = mmap.mmap(descriptor, share.size)
        finally:
            os.close(descriptor)
        for block, tensors in share.blocks.items():
            yield block, {name: _tensor(memory, stored) for name, stored in tensors.items()}


def _tensor(memory: mmap.mmap, stored: _Stored) -> Tensor:
    count = torch.Size(stored.shape).numel()
    if not count:
        return torch.empty(stored.shape, dtype=stored.dtype)
    flat = torch.frombuffer(memory, dtype=stored.dtype, count=count, offset=stored.start)
    return flat.reshape(stored.shape)
