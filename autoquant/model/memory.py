"""Where large tensors live."""

import ctypes
import sys
from dataclasses import dataclass

import torch

from autoquant.model.gpu_memory import held_bytes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

LARGE_BUFFER_BYTES = 1 << 22
"""From here on a buffer has pages of its own where blocks are streamed."""


def keep_freed_memory() -> None:
    """Tell glibc to reuse large buffers instead of returning them to the system.

    Forwards allocate and free the same tensors over and over; fetching fresh pages each time costs
    up to a third of a forward. Other C libraries are left alone.
    """
    libc = _libc()
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_large_buffers() -> None:
    """Tell glibc to give large buffers pages of their own, which it returns when they are freed.

    By itself it keeps buffers like those that it has freed once, up to 32 MiB, in its heap. Weights
    that come and go leave holes there, about a block's worth.
    """
    libc = _libc()
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BUFFER_BYTES)


def return_freed_memory() -> None:
    """Tell glibc to return the pages that lie free between what is kept.

    Small results that outlive large buffers leave holes that the next buffers do not fit.
    """
    libc = _libc()
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What this process has allocated of a GPU, in bytes."""

    device: torch.device | None = None
    """The one that this process computes on by default."""

    def begin(self) -> int:
        """What is allocated now, from where on the peak counts."""
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device) + held_bytes()

    def peak(self) -> int:
        """Most that was allocated at once since anybody began."""
        return torch.cuda.max_memory_allocated(self.device) + held_bytes()


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, pinned if it comes from a GPU: copies then wait for nothing."""
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)
