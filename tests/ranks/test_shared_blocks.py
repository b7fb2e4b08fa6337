"""Processes of one machine keep blocks in its memory once."""

import gc

import pytest
import torch
from searchable import save_searchable
from test_groups import in_a_group

from autoquant.codes.held import Weights
from autoquant.model.loading import load_model
from autoquant.model.streaming import placement, shared
from autoquant.model.streaming.blocks import BlockReader
from autoquant.model.streaming.placement import Allowance, Sizes, choose

CPU = torch.device("cpu")
GB = 1 << 30


def in_a_group_with(rank, file, folders):
    gc.disable()  # what is imported stays, and little is done with it

    def load_each(ranks):
        for folder in folders:
            load_together(ranks, folder)

    in_a_group(rank, file, 3, load_each)


def load_together(ranks, folder):
    read, reading = [], BlockReader.read

    def counted(reader, block):
        read.append(block)
        return reading(reader, block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockReader, "read", counted)
        loaded = load_model(folder, CPU, allowance=Allowance(weights=Weights.HOST), peers=ranks)
    assert ranks.all_of(lambda: read) == [[0, 3], [1], [2]]
    expected = load_model(folder, CPU).model.state_dict()
    for block in range(4):
        loaded.store.open(block)
        present = {n: t for n, t in loaded.model.state_dict().items() if not t.is_meta}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in present.items())
    ranks.all_of(lambda: "all have compared")
    weight = next(loaded.model.model.layers[3].parameters()).data.view(-1)
    ranks.own(lambda: weight[0].fill_(7.0) if ranks.is_leader else None)
    assert ranks.all_of(lambda: float(weight[0])) == [7.0, 7.0, 7.0]


@pytest.mark.slow
def test_each_process_reads_a_share_and_all_map_it(tmp_path):
    folders = [
        save_searchable(kind, tmp_path / kind, num_hidden_layers=4)
        for kind in ("llama", "minimax_m2")
    ]
    torch.multiprocessing.spawn(in_a_group_with, (str(tmp_path / "file"), folders), nprocs=3)


def test_processes_that_cannot_share_read_everything(tmp_path, monkeypatch):
    class Two(shared._Alone):
        def all_of(self, work):
            return [work(), work()]

    monkeypatch.setattr(shared, "can_share", lambda: False)
    folder = save_searchable("llama", tmp_path / "source", num_hidden_layers=2)
    loaded = load_model(folder, CPU, allowance=Allowance(weights=Weights.HOST), peers=Two())
    assert sorted(loaded.store._host) == [0, 1]


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
