"""What limits forwards on a GPU: their own memory, not that of weights on their way to it."""

import time

import pytest
import torch
from searchable import save_searchable

from autoquant.codes.held import Weights
from autoquant.forward import check
from autoquant.forward.check import Taken, activations_of, check_forward, measure_stages
from autoquant.forward.room import Room
from autoquant.forward.taps import Taps
from autoquant.measure.scorer import Scorer
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.model.streaming import work
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
    taken = measure_stages(scorer.trunk, quantized, Room(CPU), tokens, memory)
    assert (taken, memory.arrived) == (Taken(FORWARD, 2 * FORWARD), 4)


def test_it_is_measured_in_the_pass_of_the_check(streamed):
    quantized, memory = streamed
    scorer = Scorer(quantized, CPU)
    tokens = torch.randint(3, 200, (1, 16))
    taken = check_forward(scorer.trunk, quantized, Room(CPU), tokens, memory)
    assert taken == Taken(FORWARD, 2 * FORWARD)
    assert not scorer.trunk.is_whole
    assert (scorer.trunk.opened, memory.arrived) == (4, 4)
    assert check_forward(scorer.trunk, quantized, Room(CPU), tokens) is None


def test_a_model_in_one_stage_is_measured_as_a_whole(streamed):
    quantized, memory = streamed
    scorer = Scorer(quantized, CPU)
    scorer.trunk.is_whole = True
    tokens = torch.randint(3, 200, (1, 16))
    taken = check_forward(scorer.trunk, quantized, Room(CPU), tokens, memory)
    assert taken.forward >= FORWARD
    assert taken.graph > taken.forward


def test_a_stage_is_measured_with_what_gradients_keep_of_it(streamed, monkeypatch):
    quantized, memory = streamed
    scorer, tokens = Scorer(quantized, CPU), torch.randint(3, 200, (1, 16))
    installed, tapped = Taps.installed, []

    def watched(taps):
        tapped.append(torch.is_grad_enabled())
        return installed(taps)

    monkeypatch.setattr(Taps, "installed", watched)
    with torch.inference_mode():
        measure_stages(scorer.trunk, quantized, Room(CPU), tokens, memory)
    assert len(tapped) == scorer.trunk.stages


def test_a_model_without_a_backward_pass_has_no_graph(streamed, monkeypatch):
    quantized, memory = streamed
    scorer, tokens = Scorer(quantized, CPU), torch.randint(3, 200, (1, 16))
    advance = scorer.trunk.advance

    def without(stage, part, state):
        return advance(stage, part, state.detach())

    monkeypatch.setattr(scorer.trunk, "advance", without)
    taken = check_forward(scorer.trunk, quantized, Room(CPU), tokens, memory)
    assert taken == Taken(FORWARD, None)
    limited = Room(CPU)
    limited.limit(0, 1 << 20, taken.forward, taken.graph)
    assert limited.graphs_at_once == 1


def test_logits_are_compared_to_the_last_token():
    logits = torch.zeros(300, 4, dtype=torch.bfloat16)
    other = logits.float()
    assert check._is_same(logits, other)
    other[-1, -1] = 1e-3
    assert not check._is_same(logits, other)


@pytest.mark.parametrize("kind", ["llama", "zamba2"])
def test_how_much_a_stage_may_take_does_not_depend_on_where_weights_are(
    tmp_path, monkeypatch, kind
):
    """The number of sequences that run together decides the shapes of products."""
    monkeypatch.setattr(work, "ACTIVATION_BYTES", 1)
    folder = save_searchable(kind, tmp_path / kind)
    resident, streamed = (
        activations_of(
            Scorer(
                QuantizedModel(
                    loaded.model,
                    find_groups(open_source(folder)),
                    mode=ActivationMode.W4A4,
                    store=loaded.store,
                ),
                CPU,
            ).trunk
        )
        for weights in (Weights.RESIDENT, Weights.DISK)
        for loaded in [load_model(folder, CPU, allowance=Allowance(weights=weights))]
    )
    assert resident == streamed
    assert resident > 1
