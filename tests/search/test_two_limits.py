"""The knapsack under two limits, against every selection there is."""

import itertools
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoquant.errors import InfeasibleBudget
from autoquant.search.knapsack import Constraint, Knapsack

MOST_GROUPS = 4


@st.composite
def limited(draw, *, second_costs=None):
    """Up to four groups of up to four options in any order; half of them can keep both limits.

    An option is finer where it costs more of the first limit, and then it never scores worse.
    """
    scores, costs, second, finer = [], [], [], []
    if second_costs is None:
        second_costs = st.one_of(st.just(0), st.integers(1, 10**9))
    for size in draw(st.lists(st.integers(1, 4), min_size=1, max_size=MOST_GROUPS)):
        own = sorted(draw(st.lists(st.integers(1, 9), min_size=size, max_size=size)))
        scores.append(sorted(draw(st.lists(st.floats(0, 1), min_size=size, max_size=size)))[::-1])
        costs.append(own)
        second.append(draw(st.lists(second_costs, min_size=size, max_size=size)))
        finer.append(tuple(tuple(column > row for column in own) for row in own))
    budgets = [
        draw(st.integers(sum(map(min, table)), sum(map(max, table)))) for table in (costs, second)
    ]
    tables = [tuple(map(tuple, table)) for table in (scores, costs, second)]
    return Knapsack(
        tables[0], tables[1], budgets[0], Constraint(tables[2], budgets[1]), tuple(finer)
    )


def kept(knapsack):
    """Every selection that keeps both limits."""
    every = itertools.product(*(range(len(options)) for options in knapsack.costs))
    return [selection for selection in every if knapsack.fits(selection)]


def best_of_all(knapsack):
    return min(map(knapsack.score, kept(knapsack)), default=None)


@pytest.mark.slow
@given(limited())
def test_the_solution_is_the_best_of_all_that_keep_both(knapsack):
    best = best_of_all(knapsack)
    if best is None:
        with pytest.raises(InfeasibleBudget, match=r"both limits|at least"):
            knapsack.solve()
        return
    solution = knapsack.solution
    assert knapsack.fits(solution.selection)
    assert solution.score == knapsack.score(solution.selection)
    assert solution.score == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert solution.gap == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow
@given(limited(), st.integers(1, 40))
def test_beyond_the_ceiling_of_the_lists_the_gap_is_a_true_bound(knapsack, most):
    with patch("autoquant.search.partial.MOST_PARTIAL", most):
        best = best_of_all(knapsack)
        if best is None:
            with pytest.raises(InfeasibleBudget):
                knapsack.solve()
            return
        solution = knapsack.solution
    assert knapsack.fits(solution.selection)
    assert best - 1e-12 <= solution.score <= best + solution.gap + 1e-12
    assert solution.bound <= best + 1e-12


@pytest.mark.slow
@given(limited(), st.integers(1, 30))
def test_the_best_few_keep_both_limits_and_come_in_order(knapsack, count):
    if not kept(knapsack):
        return
    found = knapsack.best(count)
    assert len(set(found)) == len(found) <= count
    assert found[0] == knapsack.solve()
    assert list(map(knapsack.score, found)) == sorted(map(knapsack.score, found))
    assert all(map(knapsack.fits, found))


@given(limited())
def test_the_least_of_the_second_limit_within_the_first(knapsack):
    every = itertools.product(*(range(len(options)) for options in knapsack.costs))
    within = [one for one in every if knapsack.cost(one) <= knapsack.budget]
    least = knapsack.least_of_second
    assert knapsack.cost(least) <= knapsack.budget
    assert knapsack.second.cost(least) == min(map(knapsack.second.cost, within))


@given(limited(), st.data())
def test_a_change_of_one_group_keeps_both_limits(knapsack, data):
    selections = kept(knapsack)
    if not selections:
        return
    selection = data.draw(st.sampled_from(selections))
    group = data.draw(st.integers(0, len(selection) - 1))
    option = data.draw(st.integers(0, len(knapsack.costs[group]) - 1))
    changed = knapsack.around(selection, group, option)
    if changed is not None:
        assert knapsack.fits(changed)
    asked = (*selection[:group], option, *selection[group + 1 :])
    if knapsack.fits(asked):
        assert changed == knapsack.fill(asked, keep=group)


@given(limited(), st.data())
def test_filling_leaves_no_better_option_that_takes_more(knapsack, data):
    selections = kept(knapsack)
    if not selections:
        return
    selection = data.draw(st.sampled_from(selections))
    filled = knapsack.fill(selection)
    assert knapsack.fits(filled)
    for group, options in enumerate(knapsack.costs):
        for option in range(len(options)):
            other = (*filled[:group], option, *filled[group + 1 :])
            extras = [
                one.costs[group][option] - one.costs[group][filled[group]]
                for one in knapsack.constraints
            ]
            if knapsack.fits(other) and min(extras) >= 0 < max(extras):
                assert not knapsack.finer[group][filled[group]][option]
                assert knapsack.score(other) >= knapsack.score(filled)


@given(limited(second_costs=st.just(0)))
def test_a_second_limit_that_nothing_takes_of_changes_nothing(knapsack):
    alone = Knapsack(knapsack.scores, knapsack.costs, knapsack.budget, finer=knapsack.finer)
    assert knapsack.solution.score == pytest.approx(alone.solution.score, rel=1e-12)
    for selection in kept(knapsack)[:5]:
        assert knapsack.fill(selection) == alone.fill(selection)


def test_an_option_that_takes_a_step_less_of_one_limit_counts_by_its_score():
    """Finer or not: it trades one limit for the other."""
    finer = (((False, True), (False, False)),)
    for score, chosen in ((0.8, 0), (0.2, 1)):
        knapsack = Knapsack(((0.3, score),), ((1, 2),), 9, Constraint(((2, 1),), 9), finer)
        assert knapsack.fill((0,)) == (chosen,)


def test_limits_are_traded_as_long_as_that_scores_less():
    scores, never = ((0.5, 0.3),) * 3, (((False, False),) * 2,) * 3
    second = Constraint(((2, 1),) * 3, 6)
    assert Knapsack(scores, ((1, 2),) * 3, 6, second, never).fill((0, 0, 0)) == (1, 1, 1)
    assert Knapsack(scores, ((1, 2),) * 3, 5, second, never).fill((0, 0, 0)).count(1) == 2


def test_upgrades_end_where_scores_and_costs_go_round_in_a_circle():
    """By noise the finer option scores worse, and each trade of one cost for the other better."""
    finer = (((False, True, False), (False, False, False), (False, False, False)),)
    knapsack = Knapsack(((0.3, 0.8, 0.5),), ((2, 3, 1),), 9, Constraint(((2, 3, 4),), 9), finer)
    for option in range(3):
        assert knapsack.fits(knapsack.fill((option,)))
