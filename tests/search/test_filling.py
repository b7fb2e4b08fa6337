"""Upgrades and givings-way, one at a time in plain Python, against what is done for all at once."""

import numpy as np
import pytest

from autoquant.search.knapsack import Constraint, Knapsack


def drawn(seed, *, limits, quarters=False):
    """A knapsack of few steps, where scores and what is finer follow no costs.

    Scores in quarters make gains and rates alike.
    """
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 5, generator.integers(1, 6))

    def rows(make):
        return tuple(tuple(make(size)) for size in sizes)

    costs, second = (rows(lambda size: generator.integers(1, 7, size).tolist()) for _ in range(2))
    budgets = [
        int(generator.integers(sum(map(min, table)), 1 + sum(map(max, table))))
        for table in (costs, second)
    ]
    scores = rows(
        lambda size: (
            generator.integers(0, 5, size) / 4 if quarters else generator.uniform(0, 1, size)
        ).tolist()
    )
    finer = rows(lambda size: tuple(map(tuple, (generator.random((size, size)) < 0.3).tolist())))
    return Knapsack(
        scores,
        costs,
        budgets[0],
        Constraint(second, budgets[1]) if limits == 2 else None,
        finer,
    )


def weights(knapsack):
    """Of a step of each limit: the first limit's range over its own."""
    ranges = [
        max(1, sum(max(own) - min(own) for own in limit.costs)) for limit in knapsack.constraints
    ]
    return [ranges[0] / own for own in ranges]


def steps(knapsack, selection):
    """Every change of one group: group, option, and what it takes more of each limit."""
    for g, now in enumerate(selection):
        for option in range(len(knapsack.costs[g])):
            yield (
                g,
                option,
                [one.costs[g][option] - one.costs[g][now] for one in knapsack.constraints],
            )


def left_of(knapsack, selection):
    return [one.budget - one.cost(selection) for one in knapsack.constraints]


def filled(knapsack, selection, keep=None):
    """Upgrades, best gain per cost first, of equals the cheaper, until there are none."""
    chosen, may_trade = [*selection], True
    while True:
        left, found = left_of(knapsack, chosen), []
        for g, option, extra in steps(knapsack, chosen):
            if any(e > own for e, own in zip(extra, left, strict=True)) or max(extra) <= 0:
                continue
            gain = knapsack.scores[g][chosen[g]] - knapsack.scores[g][option]
            is_sound = knapsack.finer[g][chosen[g]][option] and min(extra) >= 0
            if is_sound or (gain > 0 and (may_trade or min(extra) >= 0)):
                spent = sum(w * max(e, 0) for w, e in zip(weights(knapsack), extra, strict=True))
                found.append((g != keep, gain / spent, -spent, g, option, gain))
        if not found:
            return tuple(chosen)
        *_, g, option, gain = max(found)
        chosen[g] = option
        may_trade = may_trade and gain > 0


def around(knapsack, selection, group, option):
    """Others give way, least loss per cost that is over, until the limits hold; then upgrades."""
    chosen = [*selection]
    chosen[group] = option
    while min(left_of(knapsack, chosen)) < 0:
        over = [max(0, -left) for left in left_of(knapsack, chosen)]
        found = []
        for g, other, extra in steps(knapsack, chosen):
            after = [
                max(0, e - own) for e, own in zip(extra, left_of(knapsack, chosen), strict=True)
            ]
            saved = sum(
                w * (before - own)
                for w, before, own in zip(weights(knapsack), over, after, strict=True)
            )
            if g != group and saved > 1e-12:
                loss = knapsack.scores[g][other] - knapsack.scores[g][chosen[g]]
                found.append((loss / saved, g, other))
        if not found:
            return None
        _, g, other = min(found)
        chosen[g] = other
    return filled(knapsack, chosen, keep=group)


def selections(knapsack):
    """Some that keep the limits."""
    every = np.ndindex(*map(len, knapsack.costs))
    kept = [selection for selection in every if knapsack.fits(selection)]
    return kept[:: 1 + len(kept) // 4]


@pytest.mark.parametrize(("limits", "quarters"), [(1, False), (2, False), (1, True)])
def test_upgrades_are_those_of_one_selection_at_a_time(limits, quarters):
    changed = 0
    for seed in range(200):
        knapsack = drawn(seed, limits=limits, quarters=quarters)
        for selection in selections(knapsack):
            assert knapsack.fill(selection) == filled(knapsack, selection)
            keep = seed % len(selection)
            assert knapsack.fill(selection, keep=keep) == filled(knapsack, selection, keep)
            changed += filled(knapsack, selection) != selection
    assert changed > 100


def test_of_upgrades_at_one_rate_the_cheaper_comes_first():
    """It leaves too little for the other, which would score less."""
    scores, costs = ((0.5, 0.25), (0.5, 0.0)), ((1, 2), (1, 3))
    assert Knapsack(scores, costs, 4).fill((0, 0)) == (1, 0)
    assert Knapsack(scores[::-1], costs[::-1], 4).fill((0, 0)) == (0, 1)


@pytest.mark.parametrize("limits", [1, 2])
def test_others_give_way_as_one_selection_at_a_time(limits):
    found = []
    for seed in range(150):
        knapsack = drawn(seed, limits=limits)
        for selection in selections(knapsack):
            group = seed % len(selection)
            for option in range(len(knapsack.costs[group])):
                expected = around(knapsack, selection, group, option)
                assert knapsack.around(selection, group, option) == expected
                found.append(expected)
    assert 10 < found.count(None) < len(found) - 100


def test_what_a_knapsack_says_of_itself_is_of_its_first_limit():
    knapsack = Knapsack(((0.5, 0.2),) * 2, ((1, 4),) * 2, 6, Constraint(((9, 7),) * 2, 16))
    assert knapsack.floor == 2
    assert knapsack.cost((0, 1)) == 5
    assert knapsack.fits((0, 1))
    assert not knapsack.fits((1, 1))
    assert not Knapsack(knapsack.scores, knapsack.costs, 4).fits((0, 1))
    assert knapsack.second.floor == 14
    assert knapsack.second.cost((0, 1)) == 16
