"""How much a scorer puts through the blocks at once, and what it keeps between candidates."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from searchable import save_searchable
from test_scores import SPLIT, scorer_of

from autoquant.formats import FP8
from autoquant.forward.again import second_forward
from autoquant.measure.kl import likelihoods
from autoquant.plan.assignment import Assignment

ROWS, LENGTH = SPLIT.batches[0].shape


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return scorer_of(save_searchable("llama", tmp_path_factory.mktemp("room") / "source"))


@pytest.fixture(autouse=True)
def forgotten(scorer):
    scorer.forget(SPLIT)


def test_waves_and_probes_are_bounded_by_the_states_of_their_forwards(scorer, monkeypatch):
    asked = []

    def waves(batches, states):
        asked.append(states)
        yield batches

    def together(probes, state):
        asked.append(state)
        yield probes

    monkeypatch.setattr(scorer, "room", scorer.room)
    monkeypatch.setattr(type(scorer.room), "waves", lambda _, *given, ranks: waves(*given))
    monkeypatch.setattr(type(scorer.room), "together", lambda _, *given: together(*given))
    state = ROWS * LENGTH * scorer.trunk.head.weight.shape[1] * 2
    fp8 = Assignment.of({group.name: FP8 for group in scorer.quantized.groups})
    scorer.score(fp8, SPLIT)
    scorer.score_fully([fp8, Assignment.of({}), fp8], SPLIT)
    [*scorer.waves(SPLIT, [0, 1], forwards=5)]
    [*scorer.probe(SPLIT, [(0, (scorer.quantized.groups[0].name, FP8))])]
    assert asked == [state, 3 * state, 5 * state, state]


def test_the_states_of_a_candidate_are_kept_where_it_goes_alone_and_memory_has_room(scorer):
    fp8 = Assignment.of({group.name: FP8 for group in scorer.quantized.groups})

    def previous(assignments):
        scorer.score_batches([assignments], SPLIT, [0])
        kept = scorer._batches[SPLIT.digest, 0].previous
        scorer.forget(SPLIT)
        return kept

    assert previous([fp8]).assignment == fp8
    assert previous([fp8, Assignment.of({})]) is None
    left, scorer._cache.left = scorer._cache.left, 0
    assert previous([fp8]) is None
    scorer._cache.left = left


@pytest.mark.parametrize(
    ("before", "is_other", "expected"),
    [(None, True, None), (None, False, 1), (2, True, 1), (2, False, 1)],
)
def test_noise_is_of_other_kernels_or_of_single_sequences(
    scorer, monkeypatch, before, is_other, expected
):
    """Attention that writes out every pair of positions also goes a sequence at a time."""
    inside = []

    @contextmanager
    def other_attention():
        inside.append(True)
        yield is_other
        inside.pop()

    monkeypatch.setattr(scorer.trunk, "other_attention", other_attention)
    monkeypatch.setattr(scorer.room, "sequences_at_once", before)
    flow = second_forward(scorer.trunk, scorer.room, SPLIT.batches[0])
    assert {len(part.tokens) for part in flow.parts} == {expected or ROWS}
    assert scorer.room.sequences_at_once == before
    with flow.inside():
        assert inside, "its blocks run there too"


def test_noise_is_measured_on_the_way_without_a_pass_of_its_own(scorer):
    fp8 = Assignment.of({group.name: FP8 for group in scorer.quantized.groups})
    alone = scorer.noise(SPLIT)
    assert alone.mean > 0.0
    for measure in (
        lambda: scorer.score_fully([fp8], SPLIT, with_noise=True),
        lambda: scorer.bf16_states(SPLIT, [0, 1], with_noise=True),
    ):
        scorer.forget(SPLIT)
        measure()
        before = scorer.trunk.opened
        assert np.array_equal(scorer.noise(SPLIT).kl, alone.kl)
        assert scorer.trunk.opened == before


def test_likelihoods_are_of_the_next_token_and_none_of_the_last():
    reference = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    logits = reference.flip(1)
    labels = torch.tensor([0, 8, 1, -1])
    found = likelihoods(reference, logits, labels)
    assert found["nll_reference"].isnan().tolist() == [False, False, False, True]
    assert found["nll"].isnan().tolist() == [False, False, False, True]
    for row, label in enumerate(labels[:3].tolist()):
        for name, of in (("nll_reference", reference), ("nll", logits)):
            expected = -of[row].log_softmax(-1)[label]
            assert found[name][row].item() == pytest.approx(expected.item(), rel=1e-5)
    assert found["agrees"].tolist() == (reference.argmax(-1) == logits.argmax(-1)).tolist()
