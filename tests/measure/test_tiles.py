"""Logits are compared a tile of tokens at a time, and what memory holds of them is kept."""

import numpy as np
import pytest
import torch
from searchable import save_searchable
from test_scores import SPLIT, scorer_of

from autoquant.formats import FP8
from autoquant.measure.compare import Cache, bytes_of
from autoquant.measure.sketch import LogitSketch
from autoquant.plan.assignment import Assignment

TOKENS = SPLIT.batches[0].numel()


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return scorer_of(save_searchable("llama", tmp_path_factory.mktemp("tiles") / "source"))


@pytest.fixture
def fp8(scorer):
    return Assignment.of({group.name: FP8 for group in scorer.quantized.groups})


@pytest.fixture
def tiles_of(scorer, monkeypatch):
    """Sets the tokens of a tile."""
    vocabulary = scorer.trunk.head.weight.shape[0]

    def tiles_of(tokens):
        monkeypatch.setattr("autoquant.forward.head.CPU_TILE_BYTES", 4 * vocabulary * tokens)

    yield tiles_of
    scorer.forget(SPLIT)


@pytest.mark.parametrize("tokens", [TOKENS, 24])
def test_a_second_look_with_kept_logits_says_the_same(scorer, fp8, tiles_of, tokens):
    """24 tokens do not divide a batch: its last tile is shorter."""
    scorer.forget(SPLIT)
    whole = scorer.score(fp8, SPLIT).kl
    scorer.forget(SPLIT)
    tiles_of(tokens)
    before = scorer._cache.left
    for _ in range(2):
        assert np.allclose(scorer.score(fp8, SPLIT).kl, whole, rtol=1e-4, atol=1e-9)
    kept = scorer._batches[SPLIT.digest, 0].logits
    assert [*kept] == [*range(0, TOKENS, tokens)]
    scorer.forget(SPLIT)
    assert scorer._cache.left == before, "what was taken is given back, to the byte"


def test_a_cache_that_is_full_changes_nothing(scorer, fp8, tiles_of):
    scorer.forget(SPLIT)
    tiles_of(24)
    whole = scorer.score(fp8, SPLIT).kl
    scorer.forget(SPLIT)
    left, scorer._cache.left = scorer._cache.left, 0
    try:
        for _ in range(2):
            assert np.array_equal(scorer.score(fp8, SPLIT).kl, whole)
        assert not scorer._batches[SPLIT.digest, 0].logits
    finally:
        scorer._cache.left = left


def test_a_probe_without_a_sketch_keeps_no_logit_change(scorer, tiles_of):
    scorer.forget(SPLIT)
    tiles_of(24)
    key = (scorer.quantized.groups[0].name, FP8)
    (plain,) = scorer.probe(SPLIT, [(0, key)])
    assert plain.sketch.dtype == torch.float32
    assert plain.sketch.numel() == 0
    sketch = LogitSketch(every=1)
    (sketched,) = scorer.probe(SPLIT, [(0, key)], sketch)
    assert np.array_equal(plain.kl.kl, sketched.kl.kl)
    assert sketched.sketch.numel() == TOKENS * sketch.width


def test_a_cache_gives_no_more_than_it_has():
    cache = Cache(10)
    assert not cache.take(11)
    assert cache.take(4)
    assert cache.take(6)
    assert not cache.take(1)
    assert bytes_of(torch.zeros(3, 5, dtype=torch.float32)) == 60
