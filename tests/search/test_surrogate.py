"""Predicted joint KL: what the quadratic says, what measured candidates teach, what is proposed."""

import itertools

import numpy as np
import pytest

from autoquant.search import predictor
from autoquant.search.knapsack import Knapsack
from autoquant.search.predictor import ranked
from autoquant.search.surrogate import PowerLaw, Surrogate


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def made(generator, groups=5, options=3):
    """A surrogate with positive main effects, random pairs, and nothing for the last option."""
    main = generator.uniform(0.5, 2.0, groups * options) * 1e-3
    main[options - 1 :: options] = 0.0
    raw = generator.normal(size=(len(main), 8))
    raw /= np.linalg.norm(raw, axis=1, keepdims=True)
    group = np.repeat(np.arange(groups), options)
    lengths = np.sqrt(main)
    pairs = 2 * (raw @ raw.T) * np.outer(lengths, lengths) * (group[:, None] != group[None, :])
    return Surrogate((options,) * groups, main, pairs, np.zeros_like(main))


def every(surrogate):
    return list(itertools.product(*(range(size) for size in surrogate.sizes)))


def test_the_quadratic_is_the_sum_and_every_pair_once(generator):
    surrogate = made(generator)
    strong = Surrogate(*_parts(surrogate), strength=0.3)
    selection = (0, 1, 2, 0, 1)
    places = strong.places([selection])[0]
    expected = strong.main[places].sum() + 0.3 * sum(
        strong.pairs[a, b] for a, b in itertools.combinations(places, 2)
    )
    assert strong.quadratic([selection])[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("strength", [-0.2, 0.0, 0.5, 1.0])
def test_fits_find_strength_and_law_of_what_made_the_figures(generator, strength):
    truth = Surrogate(*_parts(made(generator)), strength=strength, law=PowerLaw(0.7, 0.9))
    selections = every(truth)[::3]
    kl = truth.predict(selections)
    fitted = made(np.random.default_rng(0)).fitted(selections, kl)
    assert fitted.strength == pytest.approx(strength, abs=0.1)
    assert np.allclose(fitted.predict(selections), kl, rtol=0.02)


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_fits_find_the_share_of_what_gradients_do_not_see(generator, share):
    parts = _parts(made(generator))[:-1]
    excess = parts[1] * generator.uniform(0.1, 0.9, len(parts[1]))
    truth = Surrogate(*parts, excess, strength=0.2, share=share, law=PowerLaw(0.9, 0.95))
    selections = every(truth)[::3]
    kl = truth.predict(selections)
    fitted = Surrogate(*parts, excess).fitted(selections, kl)
    assert fitted.share == pytest.approx(share, abs=0.1)
    assert np.allclose(fitted.predict(selections), kl, rtol=0.02)


def test_few_measurements_leave_interactions_out(generator):
    surrogate = made(generator)
    fitted = surrogate.fitted(every(surrogate)[:5], np.full(5, 1e-3))
    assert fitted.strength == 0.0


def test_corrections_learn_an_option_that_probes_misjudged(generator):
    surrogate = made(generator)
    selections = [s for s in every(surrogate) if 2 not in s]
    extra = 0.3 * surrogate.main[3 * 3]
    kl = surrogate.predict(selections) + extra * np.array([s[3] == 0 for s in selections])
    order = generator.permutation(len(selections)).tolist()
    train, test = order[:24], order[24:]
    errors = []
    for fit in (surrogate.fitted, surrogate.refitted):
        learned = fit([selections[i] for i in train], kl[train])
        errors.append(np.abs(learned.predict([selections[i] for i in test]) - kl[test]).mean())
    assert errors[1] < 0.5 * errors[0]


def test_the_law_is_monotone_and_the_identity_without_data():
    x = np.linspace(0.0, 1.0, 50)
    law = PowerLaw.fitted(x, 3.0 * x**2)
    assert law.exponent == 1.5
    assert (np.diff(law(x)) > 0.0).all()
    assert PowerLaw.fitted(np.zeros(3), np.zeros(3)) == PowerLaw()


def test_marginal_scores_are_the_slope_of_the_prediction(generator):
    surrogate = Surrogate(*_parts(made(generator)), strength=0.2, law=PowerLaw(0.8, 1.0))
    here = (0, 0, 0, 0, 0)
    marginal = surrogate.marginal(here)
    for group, option in ((0, 1), (3, 2)):
        there = (*here[:group], option, *here[group + 1 :])
        difference = surrogate.predict([there])[0] - surrogate.predict([here])[0]
        assert marginal[group][option] - marginal[group][0] == pytest.approx(difference, rel=1e-9)


class _Problem:
    def __init__(self, knapsack):
        self.knapsack = knapsack


@pytest.mark.parametrize("seed", range(5))
def test_candidates_come_in_predicted_order_and_the_first_is_the_best_of_all(seed):
    surrogate = made(np.random.default_rng(seed), groups=6)
    surrogate = Surrogate(*_parts(surrogate), strength=0.4)
    scores = tuple(tuple(map(float, row)) for row in surrogate.main.reshape(6, 3))
    knapsack = Knapsack(scores, (((9, 16, 32),) * 6), budget=100)
    found = ranked(surrogate, _Problem(knapsack))[:20]
    predicted = surrogate.predict(found)
    assert len(set(found)) == len(found) == 20
    assert (np.diff(predicted) >= 0.0).all()
    assert all(knapsack.cost(selection) <= 100 for selection in found)
    filled = [s for s in every(surrogate) if knapsack.cost(s) <= 100 and knapsack.fill(s) == s]
    assert predicted[0] == pytest.approx(surrogate.predict(filled).min(), rel=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2, 7, 8])
def test_the_pool_grows_around_the_best_until_that_finds_no_better(seed, monkeypatch):
    """Strong interactions, and a knapsack that contributes few selections at a time."""
    monkeypatch.setattr(predictor, "_POOL", 3)
    surrogate = Surrogate(*_parts(made(np.random.default_rng(seed), groups=12)), strength=1.0)
    scores = surrogate.by_group(surrogate.main)
    knapsack = Knapsack(scores, (((9, 16, 32),) * 12), budget=200)
    order = ranked(surrogate, _Problem(knapsack))
    predicted = surrogate.predict(order)
    assert predicted[0] < surrogate.predict(knapsack.best(3)).min()
    assert (np.diff(predicted) >= 0.0).all()
    around = knapsack.with_scores(surrogate.marginal(order[0])).best(3)
    assert set(around) <= set(order)
    assert set(knapsack.best(3)) <= set(order)


def _parts(surrogate):
    return surrogate.sizes, surrogate.main, surrogate.pairs, surrogate.excess
