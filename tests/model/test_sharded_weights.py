# ruff: noqa: N802 - the names of functions are CUDA's
"""Weights on several GPUs together: when they are, and how CUDA is called for it."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from autoquant.codes.held import Weights
from autoquant.errors import ConfigError, OutOfMemory
from autoquant.model import gpu_memory
from autoquant.model.gpu_memory import CudaError, GpuMemory, free_unused, held_bytes
from autoquant.model.memory import DeviceMemory
from autoquant.model.streaming.kept import Gpus, KeptBlocks
from autoquant.model.streaming.layout import Layout, cut, dealt
from autoquant.model.streaming.placement import Allowance, Sizes, choose
from autoquant.model.streaming.shared import ALONE, HostMemory, Neighbours

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30
SIZES = Sizes(outside=2 * GIB, blocks=(4 * GIB,) * 40, stored=160 * GIB, width=8)


@pytest.mark.parametrize(
    ("gpus", "device", "expected"),
    [
        (1, 171, Weights.RESIDENT),
        (2, 171, Weights.RESIDENT),
        (1, 104, Weights.HOST),
        (2, 104, Weights.SHARDED),  # 2 + 160 / 2 + 5 blocks of 4, and 1.9 beside them
        (2, 103, Weights.HOST),
        (8, 44, Weights.SHARDED),
    ],
)
def test_gpus_hold_together_what_one_does_not(gpus, device, expected):
    may = Allowance(device_bytes=device * GIB, host_bytes=200 * GIB)
    assert choose(SIZES, CUDA, may, gpus=Gpus(gpus))[0] is expected


def test_what_does_not_fit_all_gpus_is_refused_with_what_would():
    may = Allowance(weights=Weights.SHARDED, device_bytes=40 * GIB, host_bytes=200 * GIB)
    with pytest.raises(OutOfMemory, match=r"sharded take 111\.60 GB of cuda") as caught:
        choose(SIZES, CUDA, may, gpus=Gpus(2))
    assert "--weights disk takes least" in caught.value.fix
    assert "--weights sharded takes 111.60 GB" in caught.value.fix
    with pytest.raises(OutOfMemory) as caught:
        choose(SIZES, CUDA, Allowance(device_bytes=GIB, host_bytes=GIB))
    assert "sharded" not in caught.value.fix, "one GPU shares with nobody"


@pytest.mark.parametrize(
    ("device", "reason"), [(CPU, "cpu is no GPU"), (CUDA, "one process is on this machine")]
)
def test_one_gpu_or_none_is_refused(monkeypatch, device, reason):
    monkeypatch.setattr("torch.cuda.synchronize", lambda device=None: None)
    may = Allowance(weights=Weights.SHARDED)
    with pytest.raises(ConfigError, match=reason) as caught:
        choose(SIZES, device, may, gpus=Gpus.together(device, Neighbours.of(ALONE)))
    assert "torchrun" in caught.value.fix
    assert "--weights host" in caught.value.fix


def layouts(*sizes):
    return [Layout({}, size) for size in sizes]


def test_a_block_is_cut_into_equal_pieces_that_lie_behind_those_of_the_one_before():
    first, second, third = cut(layouts(512 * 8, 512 * 5, 512), 4)
    assert [piece.size for piece in first] == [1024] * 4
    assert [piece.size for piece in second] == [1024, 1024, 512]
    assert [(piece.owner, piece.start) for piece in second] == [(0, 1024), (1, 1024), (2, 1024)]
    assert [(piece.owner, piece.start, piece.size) for piece in third] == [(0, 2048, 512)]


def test_whole_blocks_are_dealt_to_one_process_after_the_other():
    found = dealt(layouts(512, 1024, 512, 1536), 2)
    assert [[(own.owner, own.start, own.size) for own in pieces] for pieces in found] == [
        [(0, 0, 512)],
        [(1, 0, 1024)],
        [(0, 512, 512)],
        [(1, 1024, 1536)],
    ]


def test_what_other_gpus_hold_is_brought_and_the_next_ones_piece_comes_first():
    sizes, on_gpu = layouts(512 * 8, 512 * 5), SimpleNamespace(is_cuda=True)
    kept = KeptBlocks(sizes, cut(sizes, 4), None, [on_gpu] * 4, own=1, device=CPU)
    assert [kept.stored_bytes(block) for block in (0, 1)] == [3 * 1024, 1024 + 512]
    assert list(kept._in_turn(4)) == [2, 3, 0, 1]
    on_host = SimpleNamespace(is_cuda=False)
    kept = KeptBlocks(sizes, dealt(sizes, 4), None, [on_host] * 4, own=0, device=CPU)
    assert [kept.stored_bytes(block) for block in (0, 1)] == [512 * 8, 512 * 5]


class Driver:
    """The calls of the CUDA runtime, on memory of this process."""

    def __init__(self, *, failing=""):
        self.failing = failing
        self.called = []
        self.buffers = {}

    def _call(self, name, *arguments):
        self.called.append((name, *arguments))
        return 217 if name == self.failing else 0

    def cudaMalloc(self, pointer, size):
        buffer = ctypes.create_string_buffer(size.value)
        self.buffers[ctypes.addressof(buffer)] = buffer
        pointer._obj.value = ctypes.addressof(buffer)
        return self._call("cudaMalloc", size.value)

    def cudaIpcGetMemHandle(self, handle, pointer):
        ctypes.memmove(ctypes.addressof(handle._obj), pointer.value.to_bytes(64, "little"), 64)
        return self._call("cudaIpcGetMemHandle")

    def cudaIpcOpenMemHandle(self, pointer, handle, flags):
        pointer._obj.value = int.from_bytes(bytes(handle), "little")
        return self._call("cudaIpcOpenMemHandle", flags.value)

    def cudaIpcCloseMemHandle(self, pointer):
        return self._call("cudaIpcCloseMemHandle", pointer.value)

    def cudaFree(self, pointer):
        del self.buffers[pointer.value]
        return self._call("cudaFree")

    def cudaGetLastError(self):
        return self._call("cudaGetLastError")

    def cudaGetErrorString(self, code):
        return b"peer access is not supported between these two devices"


@pytest.fixture
def driver(monkeypatch):
    """Puts a driver under GpuMemory, whose memory looks like the host's."""

    def put(**settings):
        made = Driver(**settings)
        monkeypatch.setattr(gpu_memory, "_runtime", lambda: made)
        return made

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100)
    yield put
    free_unused()
    assert held_bytes() == 0


def test_memory_is_freed_when_all_processes_have_left_it(driver):
    called = driver()
    ours, theirs = (GpuMemory(CPU) for _ in range(2))
    own, ticket = ours.allocate(1000)
    seen = theirs.map(ticket)
    own.fill_(7)
    assert seen.tolist() == [7] * 1000
    assert seen.data_ptr() == own.data_ptr()
    assert called.called[-1] == ("cudaIpcOpenMemHandle", 1), "with access to the peer's memory"
    assert DeviceMemory().peak() == 1100, "PyTorch's statistics lack it"
    del ours
    assert called.buffers, "others map it still"
    del theirs
    assert called.called[-1] == ("cudaIpcCloseMemHandle", seen.data_ptr())
    assert held_bytes() == 1000
    free_unused()
    assert not called.buffers
    assert held_bytes() == 0


def test_a_call_that_fails_leaves_no_error_behind(driver):
    called = driver(failing="cudaIpcOpenMemHandle")
    memory = GpuMemory(CPU)
    _, ticket = memory.allocate(8)
    with pytest.raises(CudaError, match="cudaIpcOpenMemHandle: peer access is not supported"):
        memory.map(ticket)
    assert called.called[-1] == ("cudaGetLastError",), "or PyTorch raises it later"


class Runtime:
    """PyTorch's module of the CUDA runtime."""

    def __init__(self, code):
        self.code = code
        self.pinned = []

    def cudaHostRegister(self, address, size, flags):
        self.pinned.append((address, size))
        return self.code

    def cudaHostUnregister(self, address):
        self.pinned.remove(next(own for own in self.pinned if own[0] == address))


def kept_on_host(size):
    sizes = layouts(size)
    return KeptBlocks.allocated(sizes, dealt(sizes, 1), HostMemory(), Neighbours.of(ALONE), CPU)


def test_memory_is_pinned_as_long_as_blocks_are_kept(monkeypatch):
    runtime = Runtime(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    kept = kept_on_host(8192)
    kept.pin()
    assert [size for _, size in runtime.pinned] == [8192]
    del kept
    assert runtime.pinned == []
    kept_on_host(0).pin()  # of nothing


def test_memory_that_cannot_be_pinned_is_an_error_with_a_way_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(2))
    with pytest.raises(OutOfMemory, match=r"be pinned \(cudaHostRegister: error 2") as caught:
        kept_on_host(8192).pin()
    assert "--weights disk" in caught.value.fix
