"""How sure a mean is: units left out one by one, and drawn again, against plain loops."""

import math

import numpy as np
import pytest

from autoquant.measure import uncertainty
from autoquant.measure.uncertainty import UnitTotals

CASES = [(2, 0), (3, 1), (8, 2), (24, 3)]


def totals_of(units: int, seed: int) -> UnitTotals:
    """Units of very different sizes."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 50, units).astype(float)
    return UnitTotals(sums=tokens * generator.normal(1.0, 0.3, units), tokens=tokens)


def left_out(sums: np.ndarray, tokens: np.ndarray) -> float:
    """The standard error of a mean by leaving out its units one by one."""
    mean, units = sums.sum() / tokens.sum(), range(len(sums))
    moved = [np.delete(sums, g).sum() / np.delete(tokens, g).sum() for g in units]
    return math.sqrt(sum((m - mean) ** 2 for m in moved) * (len(sums) - 1) / len(sums))


@pytest.mark.parametrize(("units", "seed"), CASES)
def test_the_standard_error_is_that_of_leaving_out_each_unit(units, seed):
    totals = totals_of(units, seed)
    assert totals.standard_error() == pytest.approx(left_out(totals.sums, totals.tokens))


def test_of_units_of_one_size_it_is_the_textbook_one():
    means = np.random.default_rng(0).normal(1.0, 0.5, 30)
    totals = UnitTotals(sums=7 * means, tokens=np.full(30, 7.0))
    assert totals.mean == pytest.approx(means.mean())
    assert totals.standard_error() == pytest.approx(means.std(ddof=1) / math.sqrt(30))


def test_a_single_unit_has_none():
    assert math.isnan(totals_of(1, 0).standard_error())


def test_values_are_summed_by_unit_whatever_their_order_and_numbers():
    totals = UnitTotals.of(
        np.array([1.0, 10.0, 2.0, 4.0]), np.array([700, 3, 700, 3]), np.array([1.0, 2.0, 3.0, 5.0])
    )
    assert (totals.sums.tolist(), totals.tokens.tolist()) == ([14.0, 3.0], [7.0, 4.0])
    assert UnitTotals.of(np.ones(3), np.array([5, 5, 9])).tokens.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("units", [3, 8, 24])
def test_the_interval_counts_distances_in_the_standard_errors_of_their_resamples(units):
    """Against a loop over resamples, which draws the same units and leaves out one unit alone."""
    totals, distances = totals_of(units, units), []
    for picks in np.random.default_rng(5).integers(units, size=(400, units)):
        if len(set(picks)) == 1:
            continue
        sums, tokens = totals.sums[picks], totals.tokens[picks]
        mean = sums.sum() / tokens.sum()
        distances.append((mean - totals.mean) / left_out(sums, tokens))
    low, high = np.quantile(distances, [0.05, 0.95])
    error = left_out(totals.sums, totals.tokens)
    assert totals.interval(0.05, seed=5, resamples=400) == pytest.approx(
        (totals.mean - high * error, totals.mean - low * error)
    )


def test_a_constant_has_no_width():
    tokens = np.array([3.0, 5.0, 9.0])
    assert UnitTotals(sums=2 * tokens, tokens=tokens).interval(0.025, seed=0) == (2.0, 2.0)


def test_an_overflow_is_as_unsure_as_can_be():
    tokens = np.ones(9)
    totals = UnitTotals(sums=np.array([*range(8), math.inf]), tokens=tokens)
    assert math.isnan(totals.standard_error())
    assert totals.interval(0.025, seed=0) == (math.inf, math.inf)


def test_blocks_of_resamples_add_up_to_all_of_them(monkeypatch):
    monkeypatch.setattr(uncertainty, "_BLOCK", 10)
    blocks = [*uncertainty._resamples(3, 8, seed=0)]
    assert [block.shape for block in blocks] == [(3, 3), (3, 3), (2, 3)]
    assert all((block.sum(axis=1) == 3).all() for block in blocks)
    monkeypatch.setattr(uncertainty, "_BLOCK", 1)
    assert [len(block) for block in uncertainty._resamples(3, 2, seed=0)] == [1, 1]
