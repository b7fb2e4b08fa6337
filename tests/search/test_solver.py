"""The knapsack against every selection there is."""

import itertools
import math
from random import Random
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from autoquant.errors import InfeasibleBudget
from autoquant.search import partial
from autoquant.search.knapsack import Knapsack, Solution

SCALES = (1e-9, 1.0, 1e9)


@st.composite
def knapsacks(draw, most_groups=5):
    """Groups of up to four options; more bytes never score worse, as in every search."""
    scores, costs = [], []
    for _ in range(draw(st.integers(1, most_groups))):
        size = draw(st.integers(1, 4))
        own_costs = sorted(draw(st.lists(st.integers(1, 10**9), min_size=size, max_size=size)))
        own_scores = sorted(
            draw(st.lists(st.floats(0, 1, width=32), min_size=size, max_size=size)), reverse=True
        )
        scores.append(tuple(own_scores))
        costs.append(tuple(own_costs))
    floor, ceiling = sum(map(min, costs)), sum(map(max, costs))
    return Knapsack(tuple(scores), tuple(costs), draw(st.integers(floor, ceiling + 10)))


@st.composite
def small_knapsacks(draw):
    """Options of a few bytes in any order, with scores of either sign; the bound is often tight."""
    scores, costs = [], []
    for size in draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)):
        own_costs = sorted(draw(st.lists(st.integers(1, 4), min_size=size, max_size=size)))
        own_scores = sorted(
            draw(st.lists(st.floats(-1, 1), min_size=size, max_size=size)), reverse=True
        )
        order = draw(st.permutations(range(size)))
        scores.append(tuple(own_scores[i] for i in order))
        costs.append(tuple(own_costs[i] for i in order))
    floor, ceiling = sum(map(min, costs)), sum(map(max, costs))
    return Knapsack(tuple(scores), tuple(costs), draw(st.integers(floor, ceiling)))


def everything(knapsack):
    selections = itertools.product(*(range(len(options)) for options in knapsack.costs))
    return [s for s in selections if knapsack.cost(s) <= knapsack.budget]


def scaled(knapsack, factor):
    return knapsack.with_scores([[s * factor for s in options] for options in knapsack.scores])


def cheapest_upgrade(knapsack, selection):
    extras = [
        cost - options[i]
        for options, i in zip(knapsack.costs, selection, strict=True)
        for cost in options
        if cost > options[i]
    ]
    return min(extras, default=math.inf)


@given(knapsacks())
def test_the_solution_is_the_best_of_all(knapsack):
    best = min(map(knapsack.score, everything(knapsack)))
    assert knapsack.score(knapsack.solve()) == pytest.approx(best, rel=1e-9, abs=1e-12)


@given(small_knapsacks())
def test_options_need_no_order_and_scores_no_sign(knapsack):
    solution = knapsack.solve()
    assert knapsack.cost(solution) <= knapsack.budget
    assert knapsack.score(solution) <= min(map(knapsack.score, everything(knapsack))) + 1e-12


@given(small_knapsacks())
def test_a_first_guess_that_rounding_rules_out_is_the_optimum(knapsack):
    with patch("autoquant.search.relaxation._ROUNDING", 0.0):
        solution = knapsack.solve()
    assert knapsack.cost(solution) <= knapsack.budget
    assert knapsack.score(solution) <= min(map(knapsack.score, everything(knapsack))) + 1e-12


@given(knapsacks())
def test_the_solution_keeps_the_budget_and_fills_it(knapsack):
    solution = knapsack.solve()
    left = knapsack.budget - knapsack.cost(solution)
    assert 0 <= left < cheapest_upgrade(knapsack, solution)


@given(knapsacks(), st.sampled_from(SCALES))
def test_the_unit_of_the_scores_changes_nothing(knapsack, factor):
    other = scaled(knapsack, factor)
    best = min(map(other.score, everything(other)))
    assert other.score(other.solve()) == pytest.approx(best, rel=1e-9, abs=1e-12 * factor)


@given(knapsacks(), st.integers(1, 12), st.sampled_from(SCALES))
def test_the_best_few_begin_with_the_optimum_and_are_distinct(knapsack, count, factor):
    knapsack = scaled(knapsack, factor)
    found = knapsack.best(count)
    assert 1 <= len(found) <= count
    assert len(set(found)) == len(found)
    assert found[0] == knapsack.solve()
    assert list(map(knapsack.score, found)) == sorted(map(knapsack.score, found))
    for selection in found:
        left = knapsack.budget - knapsack.cost(selection)
        assert 0 <= left < cheapest_upgrade(knapsack, selection)


def test_of_many_optima_the_one_that_is_solved_for_comes_first():
    """Two groups that are alike, one of which takes the dearer option."""
    for turned in (False, True):
        scores = ((0.5, 0.25), (0.5, 0.25))
        costs = ((1, 3), (1, 2)) if turned else ((1, 2), (1, 3))
        knapsack = Knapsack(scores, costs, 4)
        assert knapsack.best(5)[0] == knapsack.solve()
        assert {knapsack.score(s) for s in knapsack.best(2)} == {0.75}


@given(knapsacks(), st.integers(1, 12))
def test_the_best_few_are_the_best_of_all_filled_ones(knapsack, count):
    filled = {knapsack.fill(selection) for selection in everything(knapsack)}
    expected = sorted(map(knapsack.score, filled))[:count]
    found = list(map(knapsack.score, knapsack.best(count)))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(knapsacks(), st.data())
def test_a_change_of_one_group_keeps_the_budget_and_fills_it(knapsack, data):
    solution = knapsack.solve()
    group = data.draw(st.integers(0, len(solution) - 1))
    option = data.draw(st.integers(0, len(knapsack.costs[group]) - 1))
    changed = knapsack.around(solution, group, option)
    cheapest = sum(min(c) for g, c in enumerate(knapsack.costs) if g != group)
    if changed is None:
        assert cheapest + knapsack.costs[group][option] > knapsack.budget
        return
    left = knapsack.budget - knapsack.cost(changed)
    assert 0 <= left < cheapest_upgrade(knapsack, changed)


@given(knapsacks())
def test_a_budget_under_the_floor_is_refused(knapsack):
    with pytest.raises(InfeasibleBudget, match=f"at least {knapsack.floor} and"):
        Knapsack(knapsack.scores, knapsack.costs, knapsack.floor - 1).solve()


@given(small_knapsacks(), st.integers(1, 40))
def test_beyond_the_ceiling_of_the_lists_the_gap_is_a_true_bound(knapsack, most):
    best = min(map(knapsack.score, everything(knapsack)))
    with patch("autoquant.search.partial.MOST_PARTIAL", most):
        solution = knapsack.solution
    assert knapsack.cost(solution.selection) <= knapsack.budget
    assert best - 1e-12 <= solution.score <= best + solution.gap + 1e-12
    assert solution.bound <= best + 1e-12


def test_scores_that_follow_the_costs_take_no_more_lists_than_the_ceiling():
    """Without it 24 such groups hold 45 million partial selections in one step."""
    random, scores, costs = Random(0), [], []
    for _ in range(24):
        elements = random.randrange(2**18, 2**24)
        own = (elements * 9 // 16 + 8, elements + 8, 2 * elements)
        costs.append(own)
        scores.append(tuple(float(own[-1] - cost) for cost in own))
    floor, ceiling = sum(map(min, costs)), sum(map(max, costs))
    knapsack = Knapsack(tuple(scores), tuple(costs), floor + (ceiling - floor) // 4)
    entries = []

    def extended(self, *options, original=partial._Lists.extended):
        entries.append(len(self.score) * len(options[0]))
        return original(self, *options)

    with patch.object(partial._Lists, "extended", extended):
        solution = knapsack.solution
    assert max(entries) <= partial.MOST_PARTIAL
    assert knapsack.cost(solution.selection) <= knapsack.budget
    # What is left of the budget is all that the score can be off by.
    least = ceiling - knapsack.budget
    assert solution.bound <= least <= solution.score
    assert 0 < solution.gap < 1e-5 * solution.score
    assert solution.caution() is None


def test_a_gap_that_matters_is_said():
    assert Solution((0,), score=2.0, bound=1.999).caution() is None
    assert "up to 25.0% above the least" in str(Solution((0,), score=2.0, bound=1.5).caution())
    assert Solution((0,), score=1.0, bound=1.5).gap == 0.0
    assert Solution((0,), score=0.0, bound=0.0).caution() is None


def test_a_finer_option_is_taken_whatever_it_scores_and_another_only_if_it_scores_less():
    finer = (((False, True, False), (False, False, False), (False, False, False)),)
    for score, chosen in ((0.4, 2), (0.75, 1)):
        knapsack = Knapsack(((0.5, 0.7, score),), ((1, 2, 3),), 3, finer=finer)
        assert knapsack.fill((0,)) == (chosen,)


@pytest.mark.slow
@settings(max_examples=3)
@given(st.integers(0, 2**32), st.sampled_from(SCALES), st.booleans())
def test_a_problem_of_the_size_of_a_real_model_is_solved(seed, factor, are_alike):
    """80 blocks of 4 groups in three formats, against a mixed-integer solver."""
    random = Random(seed)
    scores, costs = [], []
    for _ in range(320):
        elements = random.choice([1, 4, 11]) * 2**20
        kl = (1e-3 if are_alike else random.lognormvariate(-7, 1.5)) * factor
        scores.append((kl, kl / (10 if are_alike else random.uniform(5, 30)), 0.0))
        costs.append((elements * 9 // 16 + 8, elements + 8, 2 * elements))
    floor, ceiling = sum(map(min, costs)), sum(map(max, costs))
    knapsack = Knapsack(tuple(scores), tuple(costs), floor + (ceiling - floor) // 4)
    solution = knapsack.solve()
    assert knapsack.cost(solution) <= knapsack.budget
    assert all(knapsack.score(s) >= knapsack.score(solution) for s in knapsack.best(30))
    assert knapsack.score(solution) == pytest.approx(program(knapsack), rel=1e-6)


def program(knapsack):
    """The optimum by HiGHS: one option of each group, their costs within the budget."""
    groups, options = len(knapsack.scores), len(knapsack.scores[0])
    scores, costs = np.array(knapsack.scores), np.array(knapsack.costs, dtype=float)
    one_each = np.kron(np.eye(groups), np.ones(options))
    extra = (costs - costs.min(axis=1, keepdims=True)).ravel()
    spare = knapsack.budget - costs.min(axis=1).sum()
    found = milp(
        scores.ravel() / scores.max(),
        constraints=[
            LinearConstraint(one_each, 1.0, 1.0),
            LinearConstraint(extra[None] / extra.max(), -np.inf, spare / extra.max()),
        ],
        integrality=np.ones(scores.size),
        bounds=Bounds(0.0, 1.0),
        options={"mip_rel_gap": 0.0},
    )
    return found.fun * scores.max()
