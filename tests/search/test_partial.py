"""Partial selections against plain Python: what is kept of them, and in which order."""

import itertools

import numpy as np
import pytest

from autoquant.search import partial
from autoquant.search.relaxation import Priced, Tables


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def priced_of(generator, *, limits, groups=5, tightness=0.4):
    """Groups of one to four options whose scores follow no costs."""
    sizes = generator.integers(1, 5, groups)
    scores = [generator.uniform(-1, 1, size).tolist() for size in sizes]
    costs = [[generator.integers(1, 9, size).tolist() for size in sizes] for _ in range(limits)]
    floors = [sum(map(min, table)) for table in costs]
    ranges = [sum(map(max, table)) - floor for table, floor in zip(costs, floors, strict=True)]
    budgets = [f + int(tightness * r) for f, r in zip(floors, ranges, strict=True)]
    return Priced.best(Tables.of(scores, *costs), np.array(budgets))


def options_of(priced):
    return [np.flatnonzero(own).tolist() for own in priced.tables.is_option]


def cost_of(priced, selection):
    """Beyond the cheapest options, of the groups that are chosen so far, [L]."""
    return sum(priced.tables.costs[:, g, option] for g, option in enumerate(selection))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 33])
@pytest.mark.parametrize("is_second", [False, True])
def test_a_row_is_dominated_by_one_before_it_that_costs_and_scores_no_more(
    generator, rows, is_second
):
    for _ in range(30):
        scores = generator.integers(0, 6, rows).astype(float)
        costs = generator.integers(0, 6, (int(is_second), rows))
        expected = [
            all(
                scores[i] < scores[j] or (is_second and costs[0, j] > costs[0, i]) for j in range(i)
            )
            for i in range(rows)
        ]
        assert partial._undominated(scores, costs).tolist() == expected


@pytest.mark.parametrize("limits", [1, 2])
@pytest.mark.parametrize("width", [1, 3, 10, 10**4])
def test_the_beam_keeps_what_has_the_least_bound_after_every_group(
    generator, monkeypatch, limits, width
):
    """Of bounds that are equal but for rounding, the costliest, which scores least."""
    monkeypatch.setattr(partial, "_BEAM_WIDTH", width)
    for _ in range(15):
        priced = priced_of(generator, limits=limits)
        spare, excess = priced.spare, priced.excess
        kept = [()]
        for options in options_of(priced):
            kept = [(*one, option) for one in kept for option in options]
            kept = [one for one in kept if (cost_of(priced, one) <= spare).all()]
            kept.sort(
                key=lambda one: (
                    round(sum(excess[g, option] for g, option in enumerate(one)), 9),
                    -sum(cost_of(priced, one) / np.maximum(spare, 1)),
                )
            )
            kept = kept[:width]
        found = partial.beam(priced)
        assert found.shape == (len(kept), len(excess))
        assert {tuple(row) for row in found.tolist()} == set(kept)


@pytest.mark.parametrize("limits", [1, 2])
@pytest.mark.parametrize("tightness", [0.0, 0.1, 0.4, 0.9, 1.0])
def test_the_optimum_is_found_from_any_selection_within_the_budgets(generator, limits, tightness):
    for _ in range(15):
        priced = priced_of(generator, limits=limits, tightness=tightness)
        every = itertools.product(*options_of(priced))
        kept = [one for one in every if (cost_of(priced, one) <= priced.spare).all()]

        def score(selection, scores=priced.tables.scores):
            return sum(scores[g, option] for g, option in enumerate(selection))

        if not kept:
            continue
        best = min(map(score, kept))
        for incumbent in kept[:: 1 + len(kept) // 3]:
            found = partial.optimum(priced, incumbent)
            assert found in kept
            assert score(found) == pytest.approx(best, abs=1e-9)


def test_lists_that_outgrow_their_ceiling_are_given_up(generator, monkeypatch):
    """Whatever a first guess leaves of them: the worst leaves most."""
    priced = priced_of(generator, limits=1, groups=8)
    kept = [
        one
        for one in itertools.product(*options_of(priced))
        if (cost_of(priced, one) <= priced.spare).all()
    ]
    worst = max(kept, key=lambda one: sum(priced.tables.scores[g, o] for g, o in enumerate(one)))
    sizes = []
    extended = partial._Lists.extended

    def recorded(self, *arguments):
        made = extended(self, *arguments)
        sizes.append((len(self.score), len(made.score)))
        return made

    monkeypatch.setattr(partial._Lists, "extended", recorded)
    best = partial.optimum(priced, worst)
    # What a step keeps is what the next one begins with.
    kept_by = [before for before, _ in sizes[1:]]
    needed = max(sum(kept_by[:step]) + made for step, (_, made) in enumerate(sizes))
    monkeypatch.setattr(partial, "MOST_PARTIAL", needed)
    assert partial.optimum(priced, worst) == best
    monkeypatch.setattr(partial, "MOST_PARTIAL", needed - 1)
    assert partial.optimum(priced, worst) is None
