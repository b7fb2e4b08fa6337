"""Lagrangian bounds against the dual function and every selection."""

import itertools

import numpy as np
import pytest

from autoquant.search.relaxation import Priced, Tables

GRID = np.concatenate([[0.0], np.geomspace(1e-4, 10, 400)])


def drawn(seed, *, limits, groups=4, tightness=0.3):
    """Tables of one to four options a group and their budgets."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 5, groups)
    scores = [(3.0 * generator.uniform(-1, 1, size)).tolist() for size in sizes]
    costs = [[generator.integers(1, 9, size).tolist() for size in sizes] for _ in range(limits)]
    floors = [sum(map(min, table)) for table in costs]
    ranges = [sum(map(max, table)) - floor for table, floor in zip(costs, floors, strict=True)]
    budgets = [f + int(tightness * r) for f, r in zip(floors, ranges, strict=True)]
    return scores, costs, np.array(budgets)


def priced_of(drawn):
    scores, costs, budgets = drawn
    return Priced.best(Tables.of(scores, *costs), budgets)


def dual(scores, costs, budgets, multipliers):
    """Least price of every group, less what the budgets cost."""
    least = 0.0
    for g, own in enumerate(scores):
        least += min(
            score + sum(m * table[g][i] for m, table in zip(multipliers, costs, strict=True))
            for i, score in enumerate(own)
        )
    return least - sum(m * b for m, b in zip(multipliers, budgets, strict=True))


def least_score(scores, costs, budgets):
    every = itertools.product(*(range(len(own)) for own in scores))
    return min(
        (
            sum(own[i] for own, i in zip(scores, one, strict=True))
            for one in every
            if all(
                sum(own[i] for own, i in zip(table, one, strict=True)) <= budget
                for table, budget in zip(costs, budgets, strict=True)
            )
        ),
        default=None,
    )


@pytest.mark.parametrize("tightness", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(10))
def test_one_limit_has_its_highest_bound(seed, tightness):
    problem = drawn(seed, limits=1, tightness=tightness)
    priced = priced_of(problem)
    largest = max(abs(score) for own in problem[0] for score in own)
    highest = max(dual(*problem, [m * largest]) for m in GRID)
    assert highest / largest - 1e-12 <= priced.bound
    assert priced.bound - priced.rounding <= least_score(*problem) / largest
    assert priced.bound == pytest.approx(dual(*problem, priced.multipliers * largest) / largest)


@pytest.mark.parametrize("seed", range(10))
def test_the_priced_optimum_keeps_one_limit_at_the_least_multiplier(seed):
    problem = drawn(seed, limits=1)
    priced = priced_of(problem)
    rows = np.arange(len(priced.prices))
    taken = priced.tables.costs[0, rows, priced.options].sum()
    assert taken <= priced.spare[0]
    (multiplier,) = priced.multipliers
    if multiplier > 1e-12:
        cheaper = priced.tables.scores + multiplier * (1 - 1e-9) * priced.tables.costs[0]
        assert priced.tables.costs[0, rows, cheaper.argmin(axis=1)].sum() > priced.spare[0]


@pytest.mark.parametrize("seed", range(10))
def test_two_limits_have_about_their_highest_bound(seed):
    problem = drawn(seed, limits=2, tightness=0.5)
    scores, costs, budgets = problem
    best = least_score(*problem)
    assert best is not None  # or no bound is the highest
    priced = priced_of(problem)
    largest = max(abs(score) for own in scores for score in own)
    grid = GRID[::16]
    highest = max(dual(*problem, [m * largest, n * largest]) for m in grid for n in grid) / largest
    assert priced.bound >= highest - 0.01 * abs(highest)
    for k in range(2):
        alone = priced_of((scores, [costs[k]], budgets[k : k + 1]))
        assert priced.bound >= alone.bound - 0.01 * abs(alone.bound)
    assert priced.bound == pytest.approx(dual(*problem, priced.multipliers * largest) / largest)
    assert priced.bound - priced.rounding <= best / largest


def test_the_unit_of_a_second_cost_changes_no_bound():
    scores, costs, budgets = drawn(3, limits=2, tightness=0.5)
    assert least_score(scores, costs, budgets) is not None
    many = [[10**9 * cost for cost in own] for own in costs[1]]
    one, other = (
        priced_of((scores, [costs[0], second], np.array([budgets[0], budget])))
        for second, budget in ((costs[1], budgets[1]), (many, 10**9 * budgets[1]))
    )
    assert other.bound == pytest.approx(one.bound)
    assert other.options.tolist() == one.options.tolist()


def test_tables_pad_what_a_group_lacks():
    tables = Tables.of([[0.5, -4.0], [2.0]], [[3, 7], [5]], [[9, 8], [4]])
    assert tables.is_option.tolist() == [[True, True], [True, False]]
    assert tables.costs.tolist() == [[[3, 7], [5, 0]], [[9, 8], [4, 0]]]
    assert tables.cheapest.tolist() == [[3, 5], [8, 4]]
    assert tables.largest == 4.0
    normalized = tables.normalized()
    assert normalized.costs.tolist() == [[[0, 4], [0, 0]], [[1, 0], [0, 0]]]
    assert normalized.scores.tolist() == [[0.125, -1.0], [0.5, np.inf]]
    priced = Priced(normalized, np.array([4, 1]), np.array([0.5, 0.25]))
    assert priced.prices.tolist() == [[0.375, 1.0], [0.5, np.inf]]
    assert priced.options.tolist() == [0, 0]
    assert priced.excess.tolist() == [[0.0, 0.625], [0.0, np.inf]]
    assert priced.price_of_spare == 2.25
    assert priced.bound == 0.375 + 0.5 - 2.25


def test_scores_of_nothing_are_normalized_too():
    tables = Tables.of([[0.0, 0.0]], [[1, 2]])
    assert tables.largest > 0.0
    assert tables.normalized().scores.tolist() == [[0.0, 0.0]]
