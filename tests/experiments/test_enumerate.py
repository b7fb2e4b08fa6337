"""The assignments that the search is compared with: all that fill a budget, and random ones."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.search.knapsack import Knapsack
from experiments.common.enumerate import TooMany, is_maximal, maximal, random_filled
from experiments.vs_modelopt.summary import geometric


class Toy:
    """What the enumeration reads of a problem."""

    def __init__(self, costs, budget):
        scores = tuple(tuple(float(i) for i in range(len(own))) for own in costs)
        self.knapsack = Knapsack(scores, costs, budget)


@st.composite
def toys(draw):
    costs = draw(
        st.lists(
            st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5
        ).map(tuple)
    )
    floor, ceiling = sum(map(min, costs)), sum(map(max, costs))
    return Toy(costs, draw(st.integers(floor, ceiling)))


@settings(max_examples=60)
@given(toys())
def test_exactly_the_selections_that_fill_the_budget_are_enumerated(toy):
    knapsack = toy.knapsack
    everything = product(*(range(len(own)) for own in knapsack.costs))
    expected = [s for s in everything if knapsack.cost(s) <= knapsack.budget and is_maximal(toy, s)]
    assert maximal(toy, 1000) == expected


@settings(max_examples=60)
@given(toys(), st.integers(0, 3))
def test_random_assignments_fill_the_budget_and_are_distinct(toy, seed):
    drawn = random_filled(toy, 5, seed)
    assert len(set(drawn)) == len(drawn) > 0
    assert all(toy.knapsack.cost(s) <= toy.knapsack.budget and is_maximal(toy, s) for s in drawn)
    assert drawn == random_filled(toy, 5, seed)


def test_more_assignments_than_asked_for_are_refused():
    with pytest.raises(TooMany):
        maximal(Toy(((1, 2),) * 6, 9), 10)


def test_ratios_are_averaged_geometrically():
    assert geometric([0.5, 2.0]) == pytest.approx(1.0)
