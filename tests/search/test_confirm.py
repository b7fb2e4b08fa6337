"""Who wins on fresh tokens, and how sure that is."""

import numpy as np
import pytest

from autoquant.measure.kl import TokenKl
from autoquant.search.confirm import choose, paired_difference


def scores(means, seed=0, tokens=16, spread=0.02):
    """Tokens scattered around the mean of each sequence, which is a document of its own."""
    generator = np.random.default_rng(seed)
    kl = np.repeat(means, tokens) + generator.normal(0, spread, len(means) * tokens)
    own = np.arange(len(means))
    return TokenKl(kl=kl, sequence=np.repeat(own, tokens), unit=own)


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


def test_few_documents_confirm_no_gain(text):
    few, half = scores(text[:7]), scores(text[:7] * 0.5)
    winner, differences = choose([few, half], challengers=1, seed=0)
    assert winner == 0
    assert differences[1].mean < 0
    assert not differences[1].is_gain
    assert np.isnan([differences[1].low, differences[1].high]).all()


def test_many_sequences_of_few_documents_confirm_no_gain(text):
    unit = np.arange(200) % 7
    incumbent, half = (
        TokenKl(kl=text * factor, sequence=np.arange(200), unit=unit) for factor in (1.0, 0.5)
    )
    assert np.isnan(paired_difference(half, incumbent, seed=0).high)
    assert choose([incumbent, half], challengers=1, seed=0)[0] == 0


def test_a_single_finalist_wins(text):
    winner, (difference,) = choose([scores(text)], challengers=0, seed=0)
    assert winner == 0
    assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_the_interval_is_that_of_the_mean_difference(text):
    one, other = scores(text, seed=2, spread=0.5), scores(text, seed=3, spread=0.5)
    difference = paired_difference(one, other, seed=0)
    by_sequence = one.by_sequence() - other.by_sequence()
    assert difference.mean == pytest.approx(by_sequence.mean())
    half = 1.96 * by_sequence.std(ddof=1) / np.sqrt(len(by_sequence))
    assert (difference.high - difference.low) / 2 == pytest.approx(half, rel=0.1)
    assert paired_difference(one, other, seed=0) == difference


def test_a_tail_on_one_side_moves_that_bound_out(text):
    """Most is gained on few, hard documents, of which another sample may hold more."""
    difference = paired_difference(scores(text * 0.9, seed=2), scores(text, seed=3), seed=0)
    assert difference.mean - difference.low > 1.2 * (difference.high - difference.mean) > 0


def test_more_questions_widen_the_interval(text):
    one, other = scores(text * 0.9, seed=2), scores(text, seed=3)
    widths = [
        (d.high - d.low)
        for d in (paired_difference(one, other, seed=0, comparisons=n) for n in (1, 9))
    ]
    assert widths[0] < widths[1]


@pytest.mark.parametrize("documents", [8, 24])
def test_alike_sequences_of_a_document_make_no_gain(documents):
    """Of candidates that are equally good, one in forty seems to gain, as 95 % intervals promise.

    Sequences of a document are correlated by 0.3; documents have 4 to 16 of them.
    """
    generator, runs = np.random.default_rng(documents), 800
    sizes = np.resize([4, 8, 8, 16], documents)
    document = np.repeat(np.arange(documents), sizes)
    sequence = np.arange(len(document))
    zero = TokenKl(kl=np.zeros(len(document)), sequence=sequence, unit=document)
    gains = {"documents": 0, "sequences": 0}
    for seed in range(runs):
        shared = generator.normal(0, np.sqrt(0.3), documents)[document]
        difference = shared + generator.normal(0, np.sqrt(0.7), len(document))
        for name, unit in (("documents", document), ("sequences", sequence)):
            one = TokenKl(kl=difference, sequence=sequence, unit=unit)
            gains[name] += paired_difference(one, zero, seed=seed, resamples=400).is_gain
    assert 0.012 < gains["documents"] / runs < 0.042
    assert gains["sequences"] / runs > 0.1
