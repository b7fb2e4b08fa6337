"""Predicted joint KL: what the quadratic says, what measured candidates teach, what is proposed."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from autoquant.search import predictor
from autoquant.search.knapsack import Knapsack
from autoquant.search.predictor import ranked
from autoquant.search.surrogate import NOISES, PRIORS, PowerLaw, Surrogate


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


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_fits_find_the_share_of_what_gradients_do_not_see(generator, share):
    parts = _parts(made(generator))[:-1]
    excess = parts[1] * generator.uniform(0.1, 0.9, len(parts[1]))
    truth = Surrogate(*parts, excess, strength=0.2, share=share, law=PowerLaw(0.9, 0.95))
    selections = every(truth)[::3]
    kl = truth.predict(selections)
    fitted = Surrogate(*parts, excess).fitted(selections, kl)
    assert fitted.share == pytest.approx(share, abs=0.1)
    assert np.allclose(fitted.predict(selections), kl, rtol=0.02)


def with_excess(generator):
    """Interactions as strong as the expansion says, and half of every part's KL not seen by it."""
    parts = _parts(made(generator))[:-1]
    return Surrogate(*parts, 0.5 * parts[1])


@pytest.mark.parametrize(("count", "is_fitted"), [(1, False), (5, False), (6, True)])
def test_few_measurements_leave_strength_and_share_as_they_are(generator, count, is_fitted):
    surrogate = with_excess(generator)
    selections = every(surrogate)[::17][:count]
    kl = dataclasses.replace(surrogate, strength=1.0, share=0.3).predict(selections)
    fitted = surrogate.fitted(selections, kl)
    assert (fitted.strength != 0.0) == is_fitted
    assert (fitted.share != 1.0) == is_fitted


@pytest.mark.parametrize(("strength", "found"), [(-0.8, -0.5), (1.7, 1.2)])
def test_a_strength_beyond_the_bounds_is_fitted_by_the_nearest(generator, strength, found):
    surrogate = made(generator)
    selections = every(surrogate)[::3]
    truth = dataclasses.replace(surrogate, strength=strength)
    assert surrogate.fitted(selections, truth.predict(selections)).strength == found


@pytest.mark.parametrize("kl", [0.0, -1e-9])
def test_what_is_measured_at_no_kl_moves_no_fit(generator, kl):
    surrogate = with_excess(generator)
    selections = every(surrogate)[::17]
    truth = dataclasses.replace(surrogate, strength=0.6, share=0.5, law=PowerLaw(0.9, 0.9))
    measured = truth.predict(selections)
    fitted = surrogate.fitted(selections, measured)
    other = surrogate.fitted([*selections, (0, 1, 0, 1, 0)], np.append(measured, kl))
    assert (other.strength, other.share, other.law) == (fitted.strength, fitted.share, fitted.law)
    nothing = (2, 2, 2, 2, 2)
    assert surrogate.quadratic([nothing])[0] == 0.0
    other = surrogate.fitted([*selections, nothing], np.append(measured, 1e-4))
    assert (other.strength, other.share, other.law) == (fitted.strength, fitted.share, fitted.law)


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_the_simplest_of_all_that_explain_about_as_well_is_taken(generator, noise):
    """Weakest interactions first, and of those the largest share: 1.1 times the least error."""
    surrogate = with_excess(generator)
    selections = every(surrogate)[::9]
    truth = dataclasses.replace(surrogate, strength=0.6, share=0.5)
    kl = truth.predict(selections) * np.exp(noise * generator.normal(size=len(selections)))

    def error(strength, share):
        tried = dataclasses.replace(surrogate, strength=strength, share=share)
        sums = tried.quadratic(selections)
        return float(np.sum(np.log(PowerLaw.fitted(sums, kl)(sums) / kl) ** 2))

    strengths = [round(0.05 * step, 2) for step in range(-10, 25)]
    shares = [round(0.05 * step, 2) for step in range(21)]
    errors = {(s, h): error(s, h) for s in strengths for h in shares}
    good = [fit for fit, value in errors.items() if value <= 1.1 * min(errors.values())]
    fitted = surrogate.fitted(selections, kl)
    assert (fitted.strength, fitted.share) == min(good, key=lambda fit: (abs(fit[0]), -fit[1]))
    assert (fitted.strength, fitted.share) != min(errors, key=errors.__getitem__)


def test_nothing_measured_leaves_the_sum_of_the_parts(generator):
    surrogate = with_excess(generator)
    selections = every(surrogate)[:20]
    sums = [surrogate.main[surrogate.places([s])[0]].sum() for s in selections]
    for fit in (surrogate, surrogate.fitted([], np.empty(0)), surrogate.refitted([], np.empty(0))):
        assert fit.predict(selections) == pytest.approx(sums)


def test_a_strength_that_does_not_fit_leaves_a_tenth_of_the_sum(generator):
    """A prediction stays above zero."""
    surrogate = made(generator)
    against = dataclasses.replace(surrogate, pairs=-np.abs(surrogate.pairs), strength=100.0)
    selections = [s for s in every(surrogate) if s.count(2) < 4]
    sums = surrogate.predict(selections)
    assert against.quadratic(selections) == pytest.approx(0.1 * sums)


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


def test_corrections_are_those_of_the_likeliest_prior_and_noise(generator):
    """The mean of a Gaussian process over options, by its textbook formula."""
    surrogate = made(generator)
    selections = every(surrogate)[::11]
    kl = surrogate.predict(selections) * np.exp(0.05 * generator.normal(size=len(selections)))
    base, fitted = surrogate.fitted(selections, kl), surrogate.refitted(selections, kl)
    residual = kl - base.predict(selections)
    chosen = np.zeros((len(selections), len(surrogate.main)))
    for row, places in zip(chosen, surrogate.places(selections), strict=True):
        row[places] = 1.0
    deviation = np.hypot(surrogate.main, 0.01 * surrogate.main.max())
    found = []
    for prior, noise in itertools.product(PRIORS, NOISES):
        options = np.diag((prior * deviation) ** 2)
        covariance = chosen @ options @ chosen.T + (noise * kl.mean()) ** 2 * np.eye(len(kl))
        evidence = multivariate_normal(cov=covariance).logpdf(residual)
        found.append((evidence, options @ chosen.T @ np.linalg.solve(covariance, residual)))
    _, expected = max(found, key=lambda pair: pair[0])
    assert fitted.correction == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert np.abs(fitted.correction).max() > 1e-6
    expected_kl = base.predict(selections) + chosen @ expected
    assert fitted.predict(selections) == pytest.approx(expected_kl)


def test_a_law_is_a_scaled_power():
    assert PowerLaw(2.0, 0.5)(np.array([0.0, 4.0, 9.0])).tolist() == [0.0, 4.0, 6.0]


def test_the_law_is_monotone_and_the_identity_without_data():
    x = np.linspace(0.0, 1.0, 50)
    law = PowerLaw.fitted(x, 3.0 * x**2)
    assert law.exponent == 1.5
    assert (np.diff(law(x)) > 0.0).all()
    assert law(np.array([-1e-9]))[0] == 0.0
    assert PowerLaw.fitted(x, 3.0 * x**0.2).exponent == 0.5
    assert PowerLaw.fitted(np.zeros(3), np.zeros(3)) == PowerLaw() == PowerLaw(1.0, 1.0)


@pytest.mark.parametrize(
    ("count", "spread", "exponent"), [(2, 1.0, 1.0), (3, 1.0, 1.2), (9, 0.09, 1.0), (9, 0.11, 1.2)]
)
def test_an_exponent_needs_three_measurements_that_differ(count, spread, exponent):
    """By a tenth from their mean, in logarithms."""
    x = np.exp(np.linspace(-spread, spread, count))
    law = PowerLaw.fitted(x, 0.7 * x**1.2)
    assert law.exponent == pytest.approx(exponent)
    assert law.scale == pytest.approx(0.7)


def test_only_what_is_above_zero_is_fitted():
    x, y = np.array([1.0, 2.0, 4.0, 0.0, 8.0]), np.array([3.0, 6.0, 12.0, 1.0, 0.0])
    law = PowerLaw.fitted(x, y)
    assert (law.scale, law.exponent) == (pytest.approx(3.0), pytest.approx(1.0))


@pytest.mark.parametrize("exponent", [1.0, 0.8, 1.3])
@pytest.mark.parametrize("is_corrected", [False, True])
def test_marginal_scores_are_the_slope_of_the_prediction(generator, exponent, is_corrected):
    """Exactly where the law is linear, and to first order where it is not."""
    main = _parts(made(generator))[1]
    surrogate = Surrogate(
        *_parts(made(generator))[:-1],
        0.5 * main,
        strength=0.2,
        share=0.4,
        law=PowerLaw(0.8, exponent),
        correction=0.1 * main if is_corrected else None,
    )
    here = (0, 1, 0, 1, 0)
    marginal = surrogate.marginal(here)
    summed = surrogate.quadratic([here])[0]
    slope = 0.8 * exponent * summed ** (exponent - 1)
    for group, option in ((0, 1), (3, 2), (4, 1)):
        there = (*here[:group], option, *here[group + 1 :])
        difference = slope * (surrogate.quadratic([there])[0] - summed)
        if is_corrected:
            places = [surrogate.places([s])[0] for s in (here, there)]
            difference += surrogate.correction[places[1]].sum()
            difference -= surrogate.correction[places[0]].sum()
        found = marginal[group][option] - marginal[group][here[group]]
        assert found == pytest.approx(difference, rel=1e-9)


def test_where_nothing_costs_anything_the_slope_is_finite(generator):
    surrogate = dataclasses.replace(made(generator), law=PowerLaw(1.0, 0.5))
    assert np.isfinite(surrogate.marginal((2, 2, 2, 2, 2))).all()


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
