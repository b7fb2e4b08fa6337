"""When a candidate is given up, and what is said of it then."""

import math
from dataclasses import replace

import numpy as np
import pytest

from autoquant.measure.kl import TokenKl
from autoquant.measure.race import RACE_UNITS, Race

RIVAL = tuple(0.01 * (1 + number % 5) for number in range(64))
SPREAD = np.array([1.0, -1.0] * 32)
"""Of differences to the rival: mean zero on any even number of sequences."""


def scores(worse, sequences, lengths=(32,), spread=1e-3):
    """A candidate that is worse than the rival on the first sequences by `worse` on average."""
    means = np.array(RIVAL[:sequences]) + worse + spread * SPREAD[:sequences]
    sizes = np.resize(lengths, sequences)
    own = np.arange(sequences)
    return TokenKl(kl=np.repeat(means, sizes), sequence=np.repeat(own, sizes), unit=own)


def standard_error(sequences, spread=1e-3):
    return spread / math.sqrt(sequences - 1)


@pytest.mark.parametrize("sequences", [8, 16, 64])
def test_only_what_is_worse_by_three_standard_errors_is_given_up(sequences):
    race, error = Race(rival=RIVAL), standard_error(sequences)
    for errors in (-5.0, -0.1, 0.0, 0.1, 2.0, 2.9):
        assert race.lost(scores(errors * error, sequences)) is None
    gap = race.lost(scores(3.1 * error, sequences))
    assert gap is not None
    assert gap.mean == pytest.approx(3.1 * error, rel=1e-9)
    assert gap.stderr == pytest.approx(error, rel=1e-9)


def test_few_documents_give_nobody_up():
    race = Race(rival=RIVAL)
    assert race.lost(scores(1.0, RACE_UNITS - 1)) is None
    assert race.lost(scores(1.0, RACE_UNITS)) is not None


def test_the_rule_is_that_of_the_race():
    candidate = scores(2.0 * standard_error(16), 16)
    assert Race(rival=RIVAL, deviations=1.9).lost(candidate) is not None
    assert Race(rival=RIVAL, deviations=2.1).lost(candidate) is None
    assert Race(rival=RIVAL, deviations=1.9, fewest=17).lost(candidate) is None


def test_longer_sequences_count_for_more():
    """Every other sequence is three times as long and a little worse, the short ones are better."""
    candidate = scores(0.0, 64, lengths=(96, 32))
    gap = Race(rival=RIVAL, deviations=0.0).lost(candidate)
    assert gap is not None
    assert gap.mean == pytest.approx((0.75 - 0.25) * 1e-3)
    sizes = np.resize([96.0, 32.0], 64)
    without = [np.delete(sizes, i) @ np.delete(1e-3 * SPREAD, i) for i in range(64)]
    without /= sizes.sum() - sizes  # means with each sequence left out: the jackknife
    assert gap.stderr == pytest.approx(math.sqrt(63 / 64 * ((without - gap.mean) ** 2).sum()), 1e-3)


def test_sequences_of_one_document_are_one_piece_of_evidence():
    """A quarter of the documents is much worse; each document is four sequences."""
    candidate = scores(0.0, 64, spread=0.0)
    worse = np.repeat(np.resize([4e-3, 0.0, 0.0, 0.0], 16), 4)
    candidate = replace(candidate, kl=candidate.kl + np.repeat(worse, 32))
    assert Race(rival=RIVAL).lost(candidate) is not None
    assert Race(rival=RIVAL).lost(replace(candidate, unit=np.arange(64) // 4)) is None
    few = replace(candidate, unit=np.arange(64) // 16)
    assert Race(rival=RIVAL, deviations=0.0).lost(few) is None  # four documents


@pytest.mark.parametrize("kl", [math.inf, math.nan])
def test_a_candidate_that_overflows_has_no_gap(kl):
    whole = scores(1.0, 16)
    whole.kl[5] = kl
    assert Race(rival=RIVAL).lost(whole) is None


def test_a_race_is_read_back_as_it_was():
    race = Race(rival=RIVAL, deviations=2.5, fewest=9)
    assert Race.from_dict(race.to_dict()) == race
