"""Processes of one machine keep blocks in its memory once, whole or cut into pieces."""

import gc
import os

import pytest
import torch
from searchable import save_searchable
from test_groups import in_a_group

from autoquant.codes.held import Weights
from autoquant.errors import SourceError
from autoquant.model.gpu_memory import CudaError
from autoquant.model.loading import load_model
from autoquant.model.streaming import kept, placement, shared
from autoquant.model.streaming.blocks import BlockReader
from autoquant.model.streaming.kept import Gpus
from autoquant.model.streaming.placement import Allowance, Sizes, choose
from autoquant.model.streaming.shared import ALONE, HostMemory, Neighbours

CPU = torch.device("cpu")
GB = 1 << 30


def in_a_group_with(rank, file, folders):
    gc.disable()  # what is imported stays, and little is done with it

    def load_each(ranks):
        find_out_who_can_share(ranks)
        for folder in folders:
            share_host_memory(ranks, folder)
            share_pieces(ranks, folder)
        lose_a_block(ranks, folders[0])

    in_a_group(rank, file, 3, load_each)


def load_together(ranks, folder, weights):
    """What each process loads; every one reads its own blocks from the files."""
    read, reading = [], BlockReader.read

    def counted(reader, block):
        read.append(block)
        return reading(reader, block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockReader, "read", counted)
        loaded = load_model(folder, CPU, allowance=Allowance(weights=weights), peers=ranks)
    assert ranks.all_of(lambda: read) == [[0, 3], [1], [2]]
    return loaded


def compare(loaded, folder):
    """Each block as the files have it."""
    expected = load_model(folder, CPU).model.state_dict()
    for block in range(4):
        loaded.store.open(block)
        present = {n: t for n, t in loaded.model.state_dict().items() if not t.is_meta}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in present.items())
        assert all(tensor.dtype is expected[name].dtype for name, tensor in present.items())


class Deaf(HostMemory):
    """Maps pages that nobody else writes to."""

    def map(self, ticket):
        return torch.zeros(ticket.size, dtype=torch.uint8)


class Unmappable(HostMemory):
    def map(self, ticket):
        raise CudaError("peer access is not supported")


def find_out_who_can_share(ranks):
    def found(make):
        neighbours = Neighbours.of(ranks)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kept, "GpuMemory", lambda device: make())
            patch.setattr("torch.cuda.synchronize", lambda device: None)
            return Gpus.together(torch.device("cuda"), neighbours)

    assert found(HostMemory) == Gpus(3)
    assert found(Deaf).count == 1
    assert "than others have written" in found(Deaf).why_alone
    assert found(lambda: Unmappable() if ranks.number == 2 else HostMemory()) == Gpus(
        1, "GPUs of this machine cannot map each other's memory: peer access is not supported"
    )


def share_host_memory(ranks, folder):
    loaded = load_together(ranks, folder, Weights.HOST)
    compare(loaded, folder)
    ranks.all_of(lambda: "all have compared")
    weight = next(loaded.model.model.layers[3].parameters()).data.view(-1)
    ranks.own(lambda: weight[0].fill_(7.0) if ranks.is_leader else None)
    assert ranks.all_of(lambda: float(weight[0])) == [7.0, 7.0, 7.0]


def share_pieces(ranks, folder):
    """As GPUs do, which map each other's memory with other calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gpus, "together", lambda device, neighbours: Gpus(len(neighbours)))
        patch.setattr(kept, "GpuMemory", lambda device: HostMemory())
        loaded = load_together(ranks, folder, Weights.SHARDED)
    own = loaded.store._source._memories[ranks.number]
    sizes = ranks.all_of(lambda: len(own))
    assert max(sizes) - min(sizes) <= 4 * 3 * 512  # a block's last piece is the shortest
    assert sum(sizes) >= sum(placed.size for placed in loaded.store._source._layouts)
    compare(loaded, folder)
    weight = next(loaded.model.model.layers[3].parameters()).data.view(-1)
    ranks.own(lambda: weight[0].fill_(7.0) if ranks.is_leader else None)
    assert ranks.all_of(lambda: float(weight[0]) == 7.0) == [True, False, False]  # a copy of each


def lose_a_block(ranks, folder):
    """One process cannot read a block of its own; all are told."""

    def fail(reader, block):
        if block == 2:
            raise SourceError("block 2 is gone", fix="download it again")
        return reading(reader, block)

    reading = BlockReader.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockReader, "read", fail)
        with pytest.raises(SourceError, match="block 2 is gone"):
            load_model(folder, CPU, allowance=Allowance(weights=Weights.HOST), peers=ranks)


@pytest.mark.slow
def test_each_process_reads_a_share_and_all_map_it(tmp_path):
    folders = [
        save_searchable(kind, tmp_path / kind, num_hidden_layers=4)
        for kind in ("llama", "minimax_m2", "deepseek_v3")
    ]
    torch.multiprocessing.spawn(in_a_group_with, (str(tmp_path / "file"), folders), nprocs=3)


class Machines(shared._Alone):
    """Processes of which each names its machine; this one is the first."""

    def __init__(self, *others):
        self.others = others

    def all_of(self, work):
        return [work(), *self.others]


def test_neighbours_are_those_of_the_same_machine():
    own = shared._machine()
    here = Neighbours.of(Machines("elsewhere", own, "elsewhere", own))
    assert (here.numbers, here.own, len(here), here.fewest) == ((0, 2, 4), 0, 3, 2)
    assert Neighbours.of(Machines("elsewhere", own)).fewest == 1
    assert Neighbours.of(ALONE).numbers == (0,)


def test_processes_that_cannot_share_are_alone_and_read_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "can_share", lambda: False)
    monkeypatch.setattr(os, "memfd_create", None)
    assert Neighbours.of(Machines("process 1", "process 2")).numbers == (0,)
    folder = save_searchable("llama", tmp_path / "source", num_hidden_layers=4)
    compare(load_model(folder, CPU, allowance=Allowance(weights=Weights.HOST)), folder)


@pytest.mark.parametrize(
    ("processes", "can_share", "free", "expected"),
    [
        (1, True, 80 * GB, Weights.RESIDENT),
        (1, True, 30 * GB, Weights.DISK),  # beside a CPU, host and device are the same memory
        (4, True, 200 * GB, Weights.RESIDENT),
        (4, True, 80 * GB, Weights.HOST),  # four copies do not fit, one does
        (4, False, 80 * GB, Weights.DISK),
        (4, True, 35 * GB, Weights.DISK),
    ],
)
def test_several_processes_take_one_copy_where_each_its_own_does_not_fit(
    monkeypatch, processes, can_share, free, expected
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(placement, "can_share", lambda: can_share)
    sizes = Sizes(outside=GB, blocks=(GB,) * 40, stored=40 * GB, width=8)
    assert choose(sizes, CPU, Allowance(host_bytes=free))[0] is expected


class OneHasLess(shared._Alone):
    """Two processes, of which the other may use less."""

    def all_of(self, work):
        device, host = work()
        return [(device, host), (device // 2, host)]


def test_all_processes_choose_what_the_one_with_least_memory_can_hold():
    sizes = Sizes(outside=GB, blocks=(GB,) * 40, stored=40 * GB, width=8)
    may = Allowance(device_bytes=60 * GB, host_bytes=60 * GB)
    device = torch.device("cuda")
    assert choose(sizes, device, may)[0] is Weights.RESIDENT
    assert choose(sizes, device, may, peers=OneHasLess())[0] is Weights.HOST
