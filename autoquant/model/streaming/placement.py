"""Where the weights of a model go: what is asked for, or what fits."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from autoquant.codes.held import Weights
from autoquant.decimals import gigabytes
from autoquant.errors import ConfigError, OutOfMemory
from autoquant.model.memory import return_large_buffers
from autoquant.model.streaming.blocks import BlockReader
from autoquant.model.streaming.kept import Gpus, on_gpus, on_host
from autoquant.model.streaming.shared import ALONE, Neighbours, Peers, can_share
from autoquant.model.streaming.stores import BlockSource, BlockStore, Resident, Streamed
from autoquant.model.streaming.work import (
    BLOCKS_AT_ONCE,
    STATE_BYTES,
    activation_bytes,
    bytes_beside,
)

_MEMORY = Path("/proc/meminfo")

WORK_BYTES = 9 << 26
"""Of the host, for the program, its libraries and the text."""
WORK_SHARE = 1 / 10
"""What activations, states and logits take of a CPU where it is not known, in shares of the
weights."""
HEAP = 2
"""How many times what is allocated and freed by turns takes of a CPU beside resident weights, where
glibc returns nothing that is freed, and keeps holes that the next buffers do not fit."""
MOST_PACKED, MOST_DECODED = 1 << 31, 1 << 32
"""Of codes, and of the weights that they stand for, beside weights that are on a CPU."""

ONE_GPU = Gpus()
"""A process without others on its machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What may be used of the machine."""

    weights: Weights = Weights.AUTO
    device_bytes: int | None = None
    """Of the device's memory; what is free by default."""
    host_bytes: int | None = None
    """Of the host's memory, beside a GPU, for all processes on it; what is free by default."""
    work_bytes: int | None = None
    """What the work will take of a CPU beside weights and codes, where that is known."""


ANYTHING = Allowance()
"""All that is free, as it fits best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Memory of a model's weights in BF16, bytes."""

    outside: int
    """Embeddings, head and what else is in no block."""
    blocks: tuple[int, ...]
    stored: int
    """Of the blocks, as the checkpoint's files hold them."""
    width: int
    """Elements of a token's state between two blocks."""
    work: int | None = None
    """What goes on beside them takes of a CPU, where that is known."""

    @classmethod
    def of(cls, model: Any, reader: BlockReader, *, outside: int) -> Self:
        """Of a model, or of its shape alone, and of its blocks' content."""
        numbers = range(len(reader))
        return cls(
            outside=outside,
            blocks=tuple(map(reader.bytes, numbers)),
            stored=sum(map(reader.stored_bytes, numbers)),
            width=model.get_output_embeddings().weight.shape[1],
        )

    @property
    def largest_block(self) -> int:
        return max(self.blocks, default=0)

    @property
    def all(self) -> int:
        return self.outside + sum(self.blocks)

    def on_device(self, weights: Weights, *, is_gpu: bool, gpus: int = 1) -> int:
        """What a search takes of the device.

        Args:
            weights: where they are.
            is_gpu: the device is one.
            gpus: that share the blocks, where they are `sharded`.
        """
        share = -(-sum(self.blocks) // gpus) if weights is Weights.SHARDED else 0
        if is_gpu:
            return self._on_gpu(weights, share)
        if weights is Weights.RESIDENT:
            held = self.all
        else:
            held = self.outside + (BLOCKS_AT_ONCE + 1) * self.largest_block + share
        if self.work is None:
            return int(held * (1 + WORK_SHARE)) + WORK_BYTES
        return held + (HEAP if weights is Weights.RESIDENT else 1) * self.work + WORK_BYTES

    def _on_gpu(self, weights: Weights, share: int) -> int:
        """The same of a GPU, where a layer's decoded codes are beside weights that are resident."""
        block = self.largest_block
        is_resident = weights is Weights.RESIDENT
        there = self.all if is_resident else self.outside + 2 * block
        return (
            there
            + share
            + (1 if is_resident else BLOCKS_AT_ONCE - 2) * block
            + bytes_beside(
                there,
                activation_bytes(self.outside, block, self.all),
                block_leaves=0 if is_resident else block,
            )
        )

    def on_host(self, weights: Weights, *, is_gpu: bool) -> int:
        """What a process of a search takes of the host's memory; beside a CPU that is the device's.
        Processes of one machine share the blocks that are there.
        """
        if weights is Weights.HOST:
            held = sum(self.blocks) // (processes_here() if can_share() else 1)
            return held + (WORK_BYTES if is_gpu else self.on_device(Weights.DISK, is_gpu=False))
        return WORK_BYTES if is_gpu else self.on_device(weights, is_gpu=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Memory for codes, and for the weights that they stand for, where all weights are there."""

    packed: int = 0
    """Bytes."""
    decoded: int = 0
    """Bytes; a GPU decodes in no time, and keeps none."""

    @classmethod
    def beside(cls, weights: int, free: int) -> Self:
        """On a CPU: a few times the weights, as far as memory is free.

        Args:
            weights: bytes of all of them.
            free: bytes that they may take.
        """
        packed, decoded = min(3 * weights, MOST_PACKED), min(6 * weights, MOST_DECODED)
        share = min(1.0, free / max(1, packed + decoded))
        return cls(packed=int(share * packed), decoded=int(share * decoded))

    def most(self, packed: int, decoded: int) -> int:
        """Bytes that are taken of it where there are so many of both."""
        return min(self.packed, packed) + min(self.decoded, decoded)


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """Memory beside what a search takes in any case."""

    host: int
    """Bytes that states between blocks may take."""
    device: int
    """The same of a GPU, beside what is theirs in any case."""
    kept: Kept = Kept()


def open_store(
    model: Any,
    reader: BlockReader,
    device: torch.device,
    allowance: Allowance,
    peers: Peers = ALONE,
) -> tuple[BlockStore, Left]:
    """The store of a model's blocks, and the memory that is left for states between blocks.

    Args:
        model: with all that is outside of blocks, on the device.
        reader: of the content of blocks.
        device: what computes.
        allowance: what may be used.
        peers: the processes of a run, all of which open their stores now.

    Raises:
        OutOfMemory: what is asked for does not fit, or nothing does.
        SourceError: a weight is not finite, or cannot be read.
    """
    outside = (t for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
    held = sum(t.numel() * t.element_size() for t in outside)
    sizes = replace(Sizes.of(model, reader, outside=held), work=allowance.work_bytes)
    neighbours = Neighbours.of(peers)
    gpus = Gpus.together(device, neighbours)
    weights, left = choose(sizes, device, allowance, present=sizes.outside, gpus=gpus, peers=peers)
    if weights is Weights.RESIDENT:
        return Resident(model, reader, device), left
    return_large_buffers()
    source: BlockSource = reader
    if weights is Weights.SHARDED:
        source = on_gpus(model, reader, device, neighbours)
    elif weights is Weights.HOST:
        source = on_host(model, reader, device, neighbours)
    return Streamed(model, source, device), left


def choose(
    sizes: Sizes,
    device: torch.device,
    allowance: Allowance,
    *,
    present: int = 0,
    gpus: Gpus = ONE_GPU,
    peers: Peers = ALONE,
) -> tuple[Weights, Left]:
    """Where weights go, and the memory that states between blocks may take.

    Args:
        sizes: of the weights.
        device: what computes.
        allowance: what may be used.
        present: bytes of them that are on the device already.
        gpus: that can keep weights together.
        peers: the processes of a run, all of which choose now, and the same.

    Raises:
        OutOfMemory: what is asked for does not fit what may be used, or nothing does.
        ConfigError: weights are to be on several GPUs, and there is one, or none.
    """
    is_gpu = device.type == "cuda"
    if allowance.weights is Weights.SHARDED and gpus.count == 1:
        raise ConfigError(
            f"--weights sharded keeps weights on several GPUs of a machine, and {gpus.why_alone}.",
            fix="start a process for each GPU (torchrun --nproc-per-node 8 -m autoquant ...); "
            "--weights host keeps them in the host's memory once for all processes.",
        )
    free = peers.all_of(lambda: _may_be_used(device, allowance, present))
    on_device, host = map(min, zip(*free, strict=True))
    for weights in _in_order(allowance.weights, is_gpu=is_gpu, gpus=gpus.count):
        of_device = sizes.on_device(weights, is_gpu=is_gpu, gpus=gpus.count)
        of_host = sizes.on_host(weights, is_gpu=is_gpu)
        if of_device <= on_device and of_host <= host:
            free = on_device - of_device
            return weights, Left(
                host=STATE_BYTES + (host - of_host) // 2,
                device=free // 2 if is_gpu else 0,
                kept=_kept(weights, sizes, free, is_gpu=is_gpu),
            )
    raise _does_not_fit(sizes, device, allowance, on_device, host, gpus.count)


def _may_be_used(device: torch.device, allowance: Allowance, present: int) -> tuple[int, int]:
    """Bytes of the device and of the host that a process may take for a model."""
    host = allowance.host_bytes if allowance.host_bytes is not None else free_host_bytes()
    host //= processes_here()
    on_device = allowance.device_bytes
    if device.type != "cuda":
        least = host if on_device is None else min(host, on_device)
        return least, least
    if on_device is None:
        on_device = present + torch.cuda.mem_get_info(device)[0]
    return on_device, host


def _kept(weights: Weights, sizes: Sizes, free: int, *, is_gpu: bool) -> Kept:
    """Half of what is free at most. Of blocks that are streamed, codes of the last ones stay and no
    others, which are counted with them.
    """
    if weights is not Weights.RESIDENT:
        return Kept()
    return Kept(packed=free // 2) if is_gpu else Kept.beside(sizes.all, free // 2)


def _in_order(asked: Weights, *, is_gpu: bool, gpus: int) -> tuple[Weights, ...]:
    """What is tried, the fastest first; beside a CPU the host's memory is the device's, of which
    several processes take less together.
    """
    if asked is not Weights.AUTO:
        return (asked,)
    together = (Weights.SHARDED,) if gpus > 1 else ()
    beside = (Weights.HOST,) if is_gpu or processes_here() > 1 else ()
    return (Weights.RESIDENT, *together, *beside, Weights.DISK)


def processes_here() -> int:
    """How many processes a launcher has started on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_host_bytes() -> int:
    """Memory of the host that programs may still take, bytes; unlimited where it is not known."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text("ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 1 << 62


def _does_not_fit(
    sizes: Sizes, device: torch.device, allowance: Allowance, on_device: int, host: int, gpus: int
) -> OutOfMemory:
    is_gpu = device.type == "cuda"

    def needs(weights: Weights) -> str:
        of_host = f" and {gigabytes(sizes.on_host(weights, is_gpu=True))} of the host"
        of_device = gigabytes(sizes.on_device(weights, is_gpu=is_gpu, gpus=gpus))
        return f"{of_device} of {device}{of_host if is_gpu else ''}"

    wanted = Weights.DISK if allowance.weights is Weights.AUTO else allowance.weights
    there = f"{gigabytes(on_device)} of {device}"
    if is_gpu:
        there += f" and {gigabytes(host)} of the host"
    sharded = f"--weights sharded takes {needs(Weights.SHARDED)}; " if gpus > 1 else ""
    return OutOfMemory(
        f"weights on {wanted} take {needs(wanted)}; {there} may be used.",
        fix=f"--weights disk takes least, {needs(Weights.DISK)}; {sharded}--weights resident takes "
        f"{needs(Weights.RESIDENT)}.",
    )
