"""Which neighbours of an assignment are looked at, and what they are called."""

import dataclasses
import itertools

import numpy as np
import pytest
from joint import interacting

from autoquant.search.predictor import Predictor
from autoquant.search.propose import swaps
from autoquant.search.surrogate import Surrogate


@pytest.fixture
def problem(small):
    """Its groups interact at random; the optimum takes all of the budget, as do many swaps."""
    made = interacting(small(uneven=1.0))
    (limit,) = made.limits
    taken = dataclasses.replace(limit, at_most=limit.cost.total(made.optimum()))
    return dataclasses.replace(made, limits=(taken,))


@pytest.fixture
def surrogate(problem):
    return dataclasses.replace(Predictor(problem).surrogate, strength=0.5)


def changes_of(problem, selection):
    """Every other option of every group."""
    return [
        (g, option)
        for g, options in enumerate(problem.knapsack.costs)
        for option in range(len(options))
        if option != selection[g]
    ]


def changed(selection, *changes):
    chosen = [*selection]
    for g, option in changes:
        chosen[g] = option
    return tuple(chosen)


def named(problem, *changes):
    groups, choices = problem.groups, problem.accounting.choices
    return ", ".join(f"{groups[g].name} to {choices[groups[g].name][o]}" for g, o in changes)


def pairs_that_fit(problem, selection):
    return [
        (one, other)
        for one, other in itertools.combinations(changes_of(problem, selection), 2)
        if one[0] != other[0] and problem.knapsack.fits(changed(selection, one, other))
    ]


@pytest.mark.parametrize("most", [0, 1, 25, 10**6])
def test_neighbours_are_every_change_of_one_group_and_the_likeliest_of_two(
    problem, surrogate, monkeypatch, most
):
    """Pairs come in the order of what they add to first order around the selection."""
    monkeypatch.setattr(swaps, "PAIRS", most)
    knapsack, selection = problem.knapsack, problem.knapsack.solve()
    expected: dict[str, str] = {}

    def expect(found, *changes):
        if found is not None and found != selection:
            expected.setdefault(problem.decode(found).digest, named(problem, *changes))

    for change in changes_of(problem, selection):
        expect(knapsack.around(selection, *change), change)
    of_one = len(expected)
    marginal = surrogate.marginal(selection)

    def added(pair):
        return sum(marginal[g][option] - marginal[g][selection[g]] for g, option in pair)

    pairs = sorted(pairs_that_fit(problem, selection), key=added)
    taken = [knapsack.cost(changed(selection, *pair)) for pair in pairs]
    assert taken.count(knapsack.budget) > 10
    assert len(pairs) > 100
    for pair in pairs[:most]:
        expect(knapsack.fill(changed(selection, *pair)), *pair)
    found = list(swaps.neighbours(problem, surrogate, selection))
    assert {assignment.digest: name for name, assignment, _ in found} == expected
    assert len(found) == len(expected)
    assert most < 25 or len(expected) > of_one
    predicted = surrogate.predict([problem.selection(assignment) for _, assignment, _ in found])
    assert (np.diff(predicted) >= 0.0).all()


def test_a_part_that_measured_better_than_bf16_interacts_with_none(problem):
    key = problem.keys[3]
    kl = {**problem.sensitivity.kl, key: -1e-6}
    better = dataclasses.replace(
        problem, sensitivity=dataclasses.replace(problem.sensitivity, kl=kl)
    )
    surrogate = Surrogate.of(better)
    assert surrogate.main[3] == -1e-6
    assert np.isfinite(surrogate.pairs).all()
    assert not surrogate.pairs[3].any()
    assert surrogate.pairs.any()


def test_what_gradients_do_not_see_is_never_less_than_nothing(problem):
    """Of one group the gradients expect more than was measured."""
    name = problem.groups[0].name
    kl = problem.sensitivity.kl
    estimate = {key: value * (1.5 if key[0] == name else 0.75) for key, value in kl.items()}
    sensitivity = dataclasses.replace(problem.sensitivity, estimate=estimate)
    surrogate = Surrogate.of(dataclasses.replace(problem, sensitivity=sensitivity))
    for place, key in enumerate(problem.keys):
        expected = 0.0 if key[0] == name else 0.25 * surrogate.main[place]
        assert surrogate.excess[place] == pytest.approx(expected)
    assert not Surrogate.of(problem).excess.any()


def test_interactions_are_twice_the_correlation_times_both_lengths(problem):
    """Parts that change the output by vectors a and b: |a + b|^2 = |a|^2 + |b|^2 + 2 a.b."""
    surrogate = Surrogate.of(problem)
    keys, scores = problem.keys, [score for own in problem.knapsack.scores for score in own]
    correlation = problem.sensitivity.interactions.of(keys)
    for i, j in itertools.product(range(0, len(keys), 3), range(len(keys))):
        is_apart = keys[i][0] != keys[j][0]
        expected = 2 * correlation[i, j] * (scores[i] * scores[j]) ** 0.5 * is_apart
        assert surrogate.pairs[i, j] == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert np.abs(surrogate.pairs).max() > 1e-4
    assert not Surrogate.of(problem, with_pairs=False).pairs.any()
