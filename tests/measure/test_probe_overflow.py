"""KL that is not finite: kept as it was, never good, and no harm to what is."""

import json
import math

import numpy as np
import pytest

from autoquant.files import read_number, to_json
from autoquant.formats import BF16, FP8, NVFP4, Choice, ScaleRule
from autoquant.measure.interactions import Interactions
from autoquant.measure.screen import anchors, carried_over, negligible, scaled
from autoquant.measure.sensitivity import BatchProbe, Sensitivity

MSE = Choice(NVFP4.format, ScaleRule.MSE)
A, A_MSE, A_FP8, B, B_FP8 = ("a", NVFP4), ("a", MSE), ("a", FP8), ("b", NVFP4), ("b", FP8)
KEYS = [A, A_MSE, A_FP8, B, B_FP8]


def sensitivity(values, keys=KEYS, estimate=None):
    kl = dict(zip(keys, values, strict=True))
    return Sensitivity(kl, dict.fromkeys(kl, 0.001), None, estimate)


@pytest.mark.parametrize("kl", [0.5, math.inf, -math.inf, math.nan])
def test_a_probe_is_read_back_as_it_was(kl):
    probe = BatchProbe(batch=3, group="a", choice=FP8, kl_sum=kl, tokens=64, sequence_kl=(0.5, kl))
    line = to_json(probe.to_dict())
    assert repr(BatchProbe.from_dict(json.loads(line))) == repr(probe)  # NaN differs from itself


def test_a_probe_that_earlier_versions_stored_as_null_is_not_a_number():
    record = {"batch": 0, "group": "a", "choice": "fp8", "kl_sum": None, "tokens": 64}
    probe = BatchProbe.from_dict({**record, "sequence_kl": [None, 0.5]})
    assert math.isnan(probe.kl_sum)
    assert math.isnan(probe.sequence_kl[0])
    with pytest.raises(ValueError, match="could not convert"):
        read_number("lots")


@pytest.mark.parametrize("kl", [math.inf, math.nan])
def test_what_overflows_counts_for_more_than_all_others_together(kl):
    found = sensitivity([kl, 0.3, 0.1, 0.4, 0.2], estimate=dict(zip(KEYS, [kl] * 5, strict=True)))
    assert found.overflowing() == [A]
    bounded = found.bounded()
    assert bounded[A] > 0.3 + 0.1 + 0.4 + 0.2
    assert [bounded[key] for key in KEYS[1:]] == [0.3, 0.1, 0.4, 0.2]
    assert bounded["a", BF16] == 0.0
    assert set(bounded.estimate.values()) == {1.0}
    assert math.isfinite(bounded[A])
    assert not math.isfinite(found[A])
    assert json.loads(to_json(found.to_dict()))["probes"][0]["kl"] in ("Infinity", "NaN")


def test_a_sketch_that_is_not_finite_correlates_with_nothing():
    products = np.array([[4.0, 1.0, np.nan], [1.0, 1.0, np.inf], [np.nan, np.inf, np.inf]])
    found = Interactions.of_products(KEYS[:3], products)
    assert found.correlation.tolist() == [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("kl", [math.inf, math.nan])
def test_what_overflows_is_not_negligible(kl):
    estimate = sensitivity([kl, 0.1, 0.1, 1e-9, 1e-9])
    assert negligible([A, B], estimate, floor=1e-3) == {B}


@pytest.mark.parametrize("kl", [math.inf, math.nan])
def test_a_rule_that_does_not_overflow_is_probed_for_its_group(kl):
    assert anchors(KEYS, sensitivity([kl, 0.3, 0.1, 0.4, 0.2])) == {"a": A_MSE, "b": B}
    assert anchors(KEYS, sensitivity([0.3, kl, 0.1, 0.4, kl])) == {"a": A, "b": B}


@pytest.mark.parametrize("kl", [math.inf, math.nan])
@pytest.mark.parametrize("estimated", [0.2, 0.0])
def test_a_probe_that_overflows_says_nothing_of_other_choices(kl, estimated):
    estimate = sensitivity([estimated, 0.3, 0.1, 0.4, 0.2])
    exact = sensitivity([kl, 0.5], keys=[A, B])
    found = scaled(KEYS, {"a": A, "b": B}, estimate, exact)
    assert not math.isfinite(found[A])
    assert (found[A_MSE], found[A_FP8], found[B]) == (0.3, 0.1, 0.5)
    assert found[B_FP8] == pytest.approx(0.2 + 0.1 * math.sqrt(0.5))


@pytest.mark.parametrize("kl", [math.inf, math.nan])
def test_an_estimate_that_overflows_scales_nothing(kl):
    """On part of the batches the estimate overflows, and the probe on others does not."""
    estimate = sensitivity([kl, 0.3, 0.1, 0.4, 0.2])
    exact = sensitivity([0.6, 0.5], keys=[A, B])
    part = scaled(KEYS, {"a": A, "b": B}, estimate, exact)
    assert [part[key] for key in (A, A_MSE, A_FP8)] == [0.6, 0.6, 0.6]
    whole = carried_over(part, sensitivity([0.2, 0.3, 0.1, 0.4, 0.2]), estimate)
    assert not math.isfinite(whole[A])
    assert math.isfinite(whole[A_FP8])
