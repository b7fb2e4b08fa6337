"""Memory that the processes of a machine use together.

Each process allocates a part, and all map what the others have: memory of the host, or of their
GPUs. It has no name: it is gone when the last process is.
"""

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


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
class Neighbours:
    """The processes of a run that are on this machine; all processes of the run ask together."""

    peers: Peers
    numbers: tuple[int, ...]
    """Theirs in the run."""
    fewest: int
    """That any machine of the run has."""

    @classmethod
    def of(cls, peers: Peers) -> Self:
        """Those that can map this process's memory, and itself."""
        machines = peers.all_of(_machine)
        own = machines[peers.number]
        numbers = tuple(number for number, machine in enumerate(machines) if machine == own)
        return cls(peers, numbers, min(map(machines.count, machines)))

    @property
    def own(self) -> int:
        """The place of this process among them."""
        return self.numbers.index(self.peers.number)

    def __len__(self) -> int:
        return len(self.numbers)

    def all_of(self, work: Callable[[], _T]) -> list[_T]:
        """What each of them makes; an exception of any process of the run is raised on all."""
        found = self.peers.all_of(work)
        return [found[number] for number in self.numbers]


def _machine() -> str:
    """Names what processes must have in common to map each other's memory."""
    if not can_share():
        return f"process {os.getpid()}"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return f"{boot.strip()} {os.readlink('/proc/self/ns/pid')}"


class Memory(Protocol):
    """A kind of memory that one process allocates and others map."""

    def allocate(self, size: int) -> tuple[Tensor, Any]:
        """Memory [size], uint8, and what others map it with."""

    def map(self, ticket: Any) -> Tensor:
        """Memory [size], uint8, that another process has allocated."""

    def close(self, ticket: Any) -> None:
        """Let no other process map it any more."""


@dataclass(frozen=True, slots=True)
class _HostTicket:
    process: int
    descriptor: int
    size: int


class HostMemory:
    """Memory of the host."""

    def allocate(self, size: int) -> tuple[Tensor, _HostTicket]:
        """Memory [size], uint8, in pages that are taken when they are written."""
        if not can_share():
            return _flat(mmap.mmap(-1, max(1, size)), size), _HostTicket(os.getpid(), -1, size)
        descriptor = os.memfd_create("autoquant-blocks")
        os.ftruncate(descriptor, max(1, size))
        memory = mmap.mmap(descriptor, max(1, size))
        return _flat(memory, size), _HostTicket(os.getpid(), descriptor, size)

    def map(self, ticket: _HostTicket) -> Tensor:
        """Memory [size], uint8, of another process."""
        descriptor = os.open(f"/proc/{ticket.process}/fd/{ticket.descriptor}", os.O_RDWR)
        try:
            return _flat(mmap.mmap(descriptor, max(1, ticket.size)), ticket.size)
        finally:
            os.close(descriptor)

    def close(self, ticket: _HostTicket) -> None:
        """Those that have mapped it keep it."""
        if ticket.descriptor >= 0:
            os.close(ticket.descriptor)


def _flat(memory: mmap.mmap, size: int) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


def allocate_together(memory: Memory, neighbours: Neighbours, size: int) -> list[Tensor]:
    """The memory [its size], uint8, of every process of this machine, which all of them map.

    Args:
        memory: its kind.
        neighbours: the processes; those of other machines do the same now.
        size: bytes that this process has of it.
    """
    own: list[tuple[Tensor, Any]] = []

    def allocate() -> Any:
        own.append(memory.allocate(size))
        return own[0][1]

    tickets = neighbours.all_of(allocate)
    (tensor, ticket), others = own[0], dict[int, Tensor]()

    def map_others() -> None:
        for number, of_other in enumerate(tickets):
            if number != neighbours.own:
                others[number] = memory.map(of_other)

    neighbours.all_of(map_others)
    memory.close(ticket)
    return [others.get(number, tensor) for number in range(len(neighbours))]
