"""Who wins on fresh tokens, and how sure that is."""

import numpy as np
import pytest

from autoquant.measure.kl import TokenKl
from autoquant.search.confirm import choose, paired_difference


def scores(means, seed=0, tokens=16, spread=0.02):
    """Tokens scattered around each sequence's mean."""
    generator = np.random.default_rng(seed)
    kl = np.repeat(means, tokens) + generator.normal(0, spread, len(means) * tokens)
    return TokenKl(kl=kl, sequence=np.repeat(np.arange(len(means)), tokens))


@pytest.fixture
def text():
    """How hard each of 200 sequences is, which all candidates share."""
    return np.random.default_rng(1).lognormal(0, 1, 200)


def test_a_small_gain_shows_in_pairs_where_the_means_would_hide_it(text):
    incumbent, challenger = scores(text, seed=2), scores(text * 0.98, seed=3)
    assert incumbent.stderr() > 2 * abs(incumbent.mean - challenger.mean)
    winner, differences = choose([incumbent, challenger], challengers=1, seed=0)
    assert winner == 1
    assert differences[1].low < differences[1].mean < differences[1].high < 0


def test_a_difference_of_noise_leaves_the_incumbent(text):
    incumbent = scores(text, seed=2)
    challengers = [scores(text, seed=seed) for seed in range(3, 8)]
    for sequence in (0, 1, 5):
        assert choose([incumbent, *challengers], challengers=sequence, seed=0)[0] == 0


@pytest.mark.parametrize("challengers", [0, 3])
def test_the_best_of_several_that_gain_wins(text, challengers):
    candidates = [scores(text * factor, seed=9) for factor in (1.0, 0.8, 0.5, 0.9)]
    assert choose(candidates, challengers=challengers, seed=0)[0] == 2


def test_a_challenger_is_asked_only_while_those_before_it_gain(text):
    candidates = [scores(text * factor, seed=9) for factor in (1.0, 1.1, 0.5)]
    assert choose(candidates, challengers=2, seed=0)[0] == 0
    assert choose(candidates, challengers=1, seed=0)[0] == 2


def test_few_sequences_confirm_no_gain(text):
    few, half = scores(text[:7]), scores(text[:7] * 0.5)
    winner, differences = choose([few, half], challengers=1, seed=0)
    assert winner == 0
    assert differences[1].mean < 0
    assert not differences[1].is_gain
    assert np.isnan([differences[1].low, differences[1].high]).all()


def test_a_single_finalist_wins(text):
    winner, (difference,) = choose([scores(text)], challengers=0, seed=0)
    assert winner == 0
    assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_the_interval_is_that_of_the_mean_difference(text):
    one, other = scores(text * 0.9, seed=2), scores(text, seed=3)
    difference = paired_difference(one, other, seed=0)
    by_sequence = one.by_sequence() - other.by_sequence()
    assert difference.mean == pytest.approx(by_sequence.mean())
    half = 1.96 * by_sequence.std(ddof=1) / np.sqrt(len(by_sequence))
    assert (difference.high - difference.low) / 2 == pytest.approx(half, rel=0.1)
    assert paired_difference(one, other, seed=0) == difference


def test_more_questions_widen_the_interval(text):
    one, other = scores(text * 0.9, seed=2), scores(text, seed=3)
    widths = [
        (d.high - d.low)
        for d in (paired_difference(one, other, seed=0, comparisons=n) for n in (1, 9))
    ]
    assert widths[0] < widths[1]
