"""What states between stages take of a device is bounded over all forwards together."""

import gc

import pytest
import torch
from searchable import save_searchable
from test_scores import SPLIT, scorer_of

from autoquant.formats import FP8, NVFP4
from autoquant.forward import room as rooms
from autoquant.forward.held_states import HeldStates
from autoquant.measure.gradient import gradient_probe
from autoquant.plan.assignment import Assignment


def test_a_state_counts_once_and_as_long_as_somebody_has_it():
    held, state, other = HeldStates(), torch.zeros(10), torch.zeros(5)
    assert held.take(state, 60)
    assert held.take(state, 60)
    assert held.take(other, 60)
    assert held.bytes == 60
    assert not held.take(torch.zeros(1), 60)
    also = state
    del state
    assert held.bytes == 60
    del also
    assert held.bytes == 20
    assert held.take(torch.zeros(1), 60)
    assert held.bytes == 20


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return scorer_of(save_searchable("llama", tmp_path_factory.mktemp("held") / "source"))


def test_all_forwards_of_a_wave_share_the_bound(scorer, monkeypatch):
    """States that exceed it wait on the host, and nothing that was kept is left behind."""
    groups = scorer.quantized.groups
    fp8 = Assignment.of({group.name: FP8 for group in groups})
    keys = [(group.name, NVFP4) for group in groups]

    def measured():
        scorer.forget(SPLIT)
        (first,), *_ = scorer.score_batches([[fp8], [fp8]], SPLIT, [0, 1])
        (full,) = scorer.score_fully([fp8], SPLIT)
        probed = [own.kl.kl for own in scorer.probe(SPLIT, [(0, key) for key in keys])]
        estimates = gradient_probe(scorer, SPLIT, keys, [], [].append, seed=0)
        return [first.kl, full.kl, *probed], estimates

    expected = measured()
    state = scorer.state_bytes(SPLIT, 0)
    moved, most = [], []

    def on_host(tensor):
        moved.append(tensor.nbytes)
        return tensor.clone()

    take = HeldStates.take

    def watched(held, tensor, bound):
        taken = take(held, tensor, bound)
        most.append(held.bytes)
        return taken

    monkeypatch.setattr(rooms, "on_host", on_host)
    monkeypatch.setattr(HeldStates, "take", watched)
    monkeypatch.setattr(scorer.room, "device_bytes", 3 * state)
    kl, estimates = measured()
    assert all((a == b).all() for a, b in zip(kl, expected[0], strict=True))
    assert estimates == expected[1]
    assert max(most) == 3 * state
    assert moved
    scorer.forget(SPLIT)
    gc.collect()
    assert scorer.room.held.bytes == 0
