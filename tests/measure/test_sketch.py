"""Sketches of logit changes keep inner products, lengths and their place in the batch."""

import numpy as np
import pytest
import torch

from autoquant.formats import FP8, NVFP4
from autoquant.measure.interactions import Interactions, SketchBook
from autoquant.measure.sketch import MOST_BYTES, LogitSketch

KEYS = (("a", NVFP4), ("a", FP8), ("b", NVFP4))


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(512, 300, generator=generator)


def whitened(reference, logits):
    p = reference.double().softmax(-1)
    change = logits.double() - reference.double()
    return p.sqrt() * (change - (p * change).sum(-1, keepdim=True))


def test_inner_products_are_those_of_the_whitened_change(logits):
    generator = torch.Generator().manual_seed(1)
    one = logits + 0.1 * torch.randn(logits.shape, generator=generator)
    other = one + 0.05 * torch.randn(logits.shape, generator=generator)
    sketch = LogitSketch(width=64, every=1)
    ours = [sketch.of(logits, x, first=0) for x in (one, other)]
    exact = [whitened(logits, x).flatten() for x in (one, other)]
    for i, j in ((0, 0), (0, 1), (1, 1)):
        assert float(ours[i] @ ours[j]) == pytest.approx(float(exact[i] @ exact[j]), rel=0.05)


def test_half_the_squared_length_is_the_kl_of_a_small_change(logits):
    changed = logits + 0.02 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    sketch = LogitSketch(width=256, every=1).of(logits, changed, first=0)
    logp, logq = logits.double().log_softmax(-1), changed.double().log_softmax(-1)
    kl = float((logp.exp() * (logp - logq)).sum())
    assert float(sketch @ sketch) / 2 == pytest.approx(kl, rel=0.05)


@pytest.mark.parametrize("cut", [1, 8, 100, 511])
def test_tiles_do_not_matter(logits, cut):
    changed = logits.flip(1)
    sketch = LogitSketch()
    whole = sketch.of(logits, changed, first=0)
    parts = [
        sketch.of(logits[:cut], changed[:cut], first=0),
        sketch.of(logits[cut:], changed[cut:], first=cut),
    ]
    assert whole.numel() == -(-512 // sketch.every) * sketch.width
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


def test_memory_is_bounded_by_taking_fewer_tokens():
    probes, tokens = 2400, 32768
    sketch = LogitSketch.within_memory(probes=probes, tokens=tokens)
    assert 4 * probes * sketch.width * tokens / sketch.every <= MOST_BYTES
    assert 4 * probes * sketch.width * tokens / (sketch.every - 1) > MOST_BYTES
    assert LogitSketch.within_memory(probes=1, tokens=8) == LogitSketch()


def test_a_book_goes_on_where_a_killed_one_stopped(tmp_path):
    values = {
        key: torch.randn(64, generator=torch.Generator().manual_seed(i))
        for i, key in enumerate(KEYS)
    }
    SketchBook(tmp_path / "whole", KEYS, 8).put(0, KEYS[0], values[KEYS[0]])
    for folder in ("whole", "again"):
        book = SketchBook(tmp_path / folder, KEYS, 8)
        for key in KEYS[1:] if folder == "whole" else KEYS:
            book.put(0, key, values[key])
        assert not book.is_finished(0)
        book.finish(0)
        book.finish(0)
        assert book.is_finished(0)
    one, other = (SketchBook(tmp_path / f, KEYS, 8).interactions(1) for f in ("whole", "again"))
    assert np.array_equal(one.correlation, other.correlation)
    assert np.allclose(np.diag(one.correlation), 1.0)


def test_what_was_never_sketched_does_not_interact():
    interactions = Interactions.of_products(KEYS[:2], np.array([[4.0, 2.0], [2.0, 0.0]]))
    found = interactions.of([KEYS[0], KEYS[1], KEYS[2]])
    assert np.array_equal(found, [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    opposed = Interactions.of_products(KEYS[:2], np.array([[4.0, -2.0], [-2.0, 4.0]]))
    assert np.array_equal(opposed.of(KEYS[:2]), [[1.0, -0.5], [-0.5, 1.0]])
    correlated = Interactions.of_products(KEYS[:2], np.array([[4.0, 2.0], [2.0, 4.0]]))
    found = correlated.of([KEYS[2], KEYS[1], KEYS[0]])
    assert np.array_equal(found, [[0.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.5, 1.0]])
