"""Every assignment of formats that fills a budget, and random ones."""

from collections.abc import Iterator

import numpy as np

from autoquant.search.problem import Problem
from autoquant.search.relaxation import Selection


class TooMany(Exception):
    """More assignments than asked for."""


def maximal(problem: Problem, most: int) -> list[Selection]:
    """All selections within the budget in which no group can take a costlier option.

    In the order of the forward pass, later groups varying fastest.

    Raises:
        TooMany: more than `most`.
    """
    knapsack = problem.knapsack
    cheapest = [min(costs) for costs in knapsack.costs]
    found: list[Selection] = []

    def extend(chosen: tuple[int, ...], left: int) -> None:
        group = len(chosen)
        if group == len(knapsack.costs):
            if is_maximal(problem, chosen):
                found.append(chosen)
                if len(found) > most:
                    raise TooMany
            return
        for option, cost in enumerate(knapsack.costs[group]):
            extra = cost - cheapest[group]
            if extra <= left:
                extend((*chosen, option), left - extra)

    extend((), knapsack.budget - knapsack.floor)
    return found


def is_maximal(problem: Problem, selection: Selection) -> bool:
    """Whether what is left of the budget is less than the cheapest upgrade."""
    knapsack = problem.knapsack
    left = knapsack.budget - knapsack.cost(selection)
    return all(
        not 0 < cost - costs[option] <= left
        for costs, option in zip(knapsack.costs, selection, strict=True)
        for cost in costs
    )


def random_filled(problem: Problem, count: int, seed: int) -> list[Selection]:
    """Distinct selections that fill the budget, from the cheapest up by random upgrades.

    Fewer where there are no more: the search for new ones ends after twenty tries each.
    """
    generator = np.random.default_rng(seed)
    found: dict[Selection, None] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        found.setdefault(_random(problem, generator))
    return list(found)


def _random(problem: Problem, generator: np.random.Generator) -> Selection:
    costs = problem.knapsack.costs
    cheap = [[i for i, cost in enumerate(own) if cost == min(own)] for own in costs]
    chosen = [int(generator.choice(options)) for options in cheap]
    left = problem.knapsack.budget - problem.knapsack.cost(tuple(chosen))
    while upgrades := list(_upgrades(costs, chosen, left)):
        group, option, extra = upgrades[int(generator.integers(len(upgrades)))]
        chosen[group] = option
        left -= extra
    return tuple(chosen)


def _upgrades(
    costs: tuple[tuple[int, ...], ...], chosen: list[int], left: int
) -> Iterator[tuple[int, int, int]]:
    for group, own in enumerate(costs):
        for option, cost in enumerate(own):
            extra = cost - own[chosen[group]]
            if 0 < extra <= left:
                yield group, option, extra
