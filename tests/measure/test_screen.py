"""Screened probes: which choice of a group is measured, and how the others follow."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoquant.formats import FP8, NVFP4, Choice
from autoquant.measure.interactions import Interactions
from autoquant.measure.screen import (
    EXCESS,
    anchors,
    carried_over,
    measured_batches,
    negligible,
    scaled,
)
from autoquant.measure.sensitivity import Sensitivity

MSE = Choice.parse("nvfp4/mse")
KEYS = [("a", NVFP4), ("a", MSE), ("a", FP8), ("b", FP8)]


def sensitivity(values, interactions=None):
    return Sensitivity(values, {key: value / 10 for key, value in values.items()}, interactions)


ESTIMATE = sensitivity(dict(zip(KEYS, [0.08, 0.04, 0.01, 0.02], strict=True)))


def test_each_group_is_probed_in_its_cheapest_format_under_the_best_rule():
    assert anchors(KEYS, ESTIMATE) == {"a": ("a", MSE), "b": ("b", FP8)}


def test_what_exceeds_the_estimate_grows_with_the_root():
    found = scaled(
        KEYS, anchors(KEYS, ESTIMATE), ESTIMATE, sensitivity({("a", MSE): 0.06, ("b", FP8): 0.03})
    )
    assert found["a", MSE] == 0.06
    assert found["b", FP8] == 0.03
    assert found["a", FP8] == pytest.approx(0.01 + 0.02 * 0.5)
    assert found["a", NVFP4] == pytest.approx(0.08 + 0.02 * math.sqrt(2))
    assert found.stderr["a", FP8] == pytest.approx(0.002)


def test_a_kl_below_its_estimate_scales_the_others():
    found = scaled(
        KEYS, anchors(KEYS, ESTIMATE), ESTIMATE, sensitivity({("a", MSE): 0.03, ("b", FP8): 0.03})
    )
    assert found["a", FP8] == pytest.approx(0.0075)
    assert found["a", NVFP4] == pytest.approx(0.06)


def test_a_group_without_any_effect_costs_what_was_measured():
    nothing = sensitivity(dict.fromkeys(KEYS, 0.0))
    found = scaled(
        KEYS, anchors(KEYS, nothing), nothing, sensitivity({("a", NVFP4): 0.0, ("b", FP8): 0.0})
    )
    assert set(found.kl.values()) == {0.0}
    assert math.isnan(found.stderr["a", FP8])


def test_groups_that_together_stay_below_the_noise_are_not_measured():
    a, b = ("a", MSE), ("b", FP8)  # estimated at 0.04 and 0.02
    assert negligible([a, b], ESTIMATE, floor=0.02 * EXCESS) == set()
    assert negligible([a, b], ESTIMATE, floor=0.05 * EXCESS) == {b}
    assert negligible([a, b], ESTIMATE, floor=0.07 * EXCESS) == {a, b}


def test_what_was_not_measured_keeps_its_estimate():
    found = scaled(KEYS, anchors(KEYS, ESTIMATE), ESTIMATE, sensitivity({("b", FP8): 0.03}))
    assert [found[key] for key in KEYS] == [0.08, 0.04, 0.01, 0.03]
    assert found.stderr["a", FP8] == pytest.approx(0.001)


positive = st.floats(1e-9, 10.0)


@given(st.tuples(positive, positive, positive), positive)
def test_the_order_of_the_estimates_stays(estimates, measured):
    estimate = sensitivity(dict(zip(KEYS[:3], estimates, strict=True)))
    anchor = anchors(KEYS[:3], estimate)["a"]
    found = scaled(KEYS[:3], {"a": anchor}, estimate, sensitivity({anchor: measured}))
    by_estimate = sorted(KEYS[:3], key=lambda key: estimate[key])
    values = [found[key] for key in by_estimate]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(values))
    assert min(found[key] for key in KEYS[:2]) == pytest.approx(measured)


def test_choices_share_the_interactions_of_their_group():
    probed = (("a", MSE), ("b", FP8))
    measured = Interactions(probed, np.array([[1.0, 0.5], [0.5, 1.0]]))
    exact = sensitivity({("a", MSE): 0.06, ("b", FP8): 0.03}, measured)
    found = scaled(KEYS, anchors(KEYS, ESTIMATE), ESTIMATE, exact).interactions
    assert found.of([("a", NVFP4), ("b", FP8)])[0, 1] == 0.5
    assert found.of([("a", FP8), ("b", FP8)])[0, 1] == 0.5


def test_half_of_the_tokens_are_carried_over_in_proportion_to_the_estimates():
    half = sensitivity({("a", MSE): 0.06, ("b", FP8): 0.03})
    beside = sensitivity({("a", MSE): 0.05, ("b", FP8): 0.0})
    whole = carried_over(half, beside, ESTIMATE)  # ("a", MSE) is estimated at 0.04 on all tokens
    assert whole["a", MSE] == pytest.approx(0.06 * 0.04 / 0.05)
    assert whole.stderr["a", MSE] == pytest.approx(0.006 * 0.04 / 0.05)
    assert whole["b", FP8] == 0.03
    assert whole.estimate == ESTIMATE.kl


def test_exact_probes_run_on_every_second_batch():
    assert [*measured_batches(5)] == [0, 2, 4]
    assert [*measured_batches(1)] == [0]
