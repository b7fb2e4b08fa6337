"""What limits forwards on a GPU: their own memory, not that of weights on their way to it."""

import time

import pytest
import torch
from searchable import save_searchable

from autoquant.codes.held import Weights
from autoquant.forward.check import activation_bytes, check_forward
from autoquant.forward.room import Room
from autoquant.measure.scorer import Scorer
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.model.streaming.blocks import BlockReader
from autoquant.model.streaming.placement import Allowance
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

CPU = torch.device("cpu")
BLOCK, FORWARD = 1000, 7


class Memory:
    """Of a device on which each block that has arrived takes `BLOCK` bytes, and a forward takes
    `FORWARD`; the block behind is there by the end of every forward.
    """

    def __init__(self, store):
        self.arrived, self._store = 0, store

    def begin(self):
        return BLOCK * self.arrived

    def peak(self):
        self._store.settle()
        return BLOCK * self.arrived + FORWARD


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    folder = save_searchable("llama", tmp_path / "source", num_hidden_layers=4)
    loaded = load_model(folder, CPU, allowance=Allowance(weights=Weights.DISK))
    groups = find_groups(open_source(folder))
    quantized = QuantizedModel(
        loaded.model, groups, mode=ActivationMode.W4A4, store=loaded.store, packed_bytes=0
    )
    memory, reading = Memory(loaded.store), BlockReader.read

    def slow(reader, block):
        time.sleep(0.05)
        memory.arrived += 1
        return reading(reader, block)

    monkeypatch.setattr(BlockReader, "read", slow)
    return quantized, memory


def test_a_block_that_arrives_meanwhile_is_not_the_forwards(streamed):
    quantized, memory = streamed
    scorer = Scorer(quantized, CPU)
    tokens = torch.randint(3, 200, (1, 16))
    taken = activation_bytes(scorer.trunk, quantized, Room(CPU), tokens, memory)
    assert (taken, memory.arrived) == (FORWARD, 4)


def test_it_is_measured_in_the_pass_of_the_check(streamed):
    quantized, memory = streamed
    scorer = Scorer(quantized, CPU)
    tokens = torch.randint(3, 200, (1, 16))
    assert check_forward(scorer.trunk, quantized, Room(CPU), tokens, memory) == FORWARD
    assert not scorer.trunk.is_whole
    assert (scorer.trunk.opened, memory.arrived) == (4, 4)
    assert check_forward(scorer.trunk, quantized, Room(CPU), tokens) is None


def test_a_model_in_one_stage_is_measured_as_a_whole(streamed):
    quantized, memory = streamed
    scorer = Scorer(quantized, CPU)
    scorer.trunk.is_whole = True
    tokens = torch.randint(3, 200, (1, 16))
    assert check_forward(scorer.trunk, quantized, Room(CPU), tokens, memory) >= FORWARD
