"""Memory of a GPU that the other processes of its machine map, by CUDA's own calls.

PyTorch can share its tensors, too. But it maps them by a context on the device of each, which takes
some 500 MB of every device for every process, and memory of `expandable_segments:True` only where
the system lets processes open each other's files. What comes from `cudaMalloc` is mapped into the
context that a process has already.
"""

import ctypes
import gc
import weakref
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

_WITH_PEER_ACCESS = 1
"""`cudaIpcMemLazyEnablePeerAccess`."""


class CudaError(RuntimeError):
    """What CUDA says of a call that failed."""


class _Handle(ctypes.Structure):
    """`cudaIpcMemHandle_t`."""

    _fields_ = (("reserved", ctypes.c_char * 64),)


@dataclass(frozen=True, slots=True)
class GpuTicket:
    """What another process needs to map memory."""

    handle: bytes
    size: int


@dataclass(slots=True)
class _Held:
    """What this process has allocated by itself, which PyTorch's statistics lack."""

    pointers: dict[int, int] = field(default_factory=dict)
    """Bytes at each address."""
    unused: list[int] = field(default_factory=list)
    """Addresses that nothing in this process uses any more; others may still map them."""


_HELD = _Held()


def held_bytes() -> int:
    """Of GPUs, what this process has allocated beside PyTorch."""
    return sum(_HELD.pointers.values())


class GpuMemory:
    """Allocates memory of this process's GPU, and maps that of others.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.empty(0, device=device).device  # by its number
        self._mapped: list[int] = []
        self._own: list[int] = []
        finish = weakref.finalize(self, _leave, self._device, self._mapped, self._own)
        finish.atexit = False  # the driver does it

    def allocate(self, size: int) -> tuple[Tensor, GpuTicket]:
        """Memory [size], uint8, as long as this object lives, and what others map it with.

        Raises:
            CudaError: there is not so much, or it cannot be shared.
        """
        pointer, handle = ctypes.c_void_p(), _Handle()
        with torch.cuda.device(self._device):
            _call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(1, size)))
            address = pointer.value or 0
            _HELD.pointers[address] = size
            self._own.append(address)
            _call("cudaIpcGetMemHandle", ctypes.byref(handle), pointer)
        return self._tensor(address, size), GpuTicket(bytes(handle), size)

    def map(self, ticket: GpuTicket) -> Tensor:
        """Memory [size], uint8, of another process, as long as this object lives.

        The tensor says that it is on this process's device. So PyTorch copies from it, over the
        link between the devices, as it copies within one, and asks for no context on the other.

        Raises:
            CudaError: this GPU cannot reach it.
        """
        pointer, handle = ctypes.c_void_p(), _Handle.from_buffer_copy(ticket.handle)
        with torch.cuda.device(self._device):
            flags = ctypes.c_uint(_WITH_PEER_ACCESS)
            _call("cudaIpcOpenMemHandle", ctypes.byref(pointer), handle, flags)
        address = pointer.value or 0
        self._mapped.append(address)
        return self._tensor(address, ticket.size)

    def close(self, ticket: GpuTicket) -> None:
        """A ticket holds nothing."""

    def _tensor(self, address: int, size: int) -> Tensor:
        storage: Any = torch._C._construct_storage_from_data_pointer(address, self._device, size)
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)


def _leave(device: torch.device, mapped: list[int], own: list[int]) -> None:
    """Map others' memory no more. One's own is kept until nobody maps it."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        for address in mapped:
            _call("cudaIpcCloseMemHandle", ctypes.c_void_p(address))
    _HELD.unused.extend(own)


def leave_unused() -> None:
    """Map no memory of others any more that nothing in this process uses."""
    if _HELD.pointers:
        gc.collect()  # models hold themselves in circles


def free_unused() -> None:
    """Free memory that nothing uses, when all processes have left it."""
    while _HELD.unused:
        address = _HELD.unused.pop()
        _call("cudaFree", ctypes.c_void_p(address))
        del _HELD.pointers[address]


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the CUDA runtime.

    Raises:
        CudaError: it has failed.
    """
    runtime = _runtime()
    code = getattr(runtime, name)(*arguments)
    if code != 0:
        runtime.cudaGetLastError()  # or PyTorch's next call would raise it
        said = runtime.cudaGetErrorString(code)
        raise CudaError(f"{name}: {said.decode('ascii', 'replace')}")


@cache
def _runtime() -> Any:
    """The CUDA runtime that PyTorch has loaded.

    Raises:
        CudaError: PyTorch has it in a file of another name.
    """
    version = (torch.version.cuda or "").partition(".")[0]
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{version}")
    except OSError as error:
        raise CudaError(str(error)) from error
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime
