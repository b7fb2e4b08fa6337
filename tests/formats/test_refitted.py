"""Weights that answer drifted inputs as the original ones answer the BF16 model's."""

import pytest
import torch
from fitting import (
    FP8,
    INPUTS,
    OUTPUTS,
    decoded,
    harm_of,
    inputs,
    moments,
    nearest,
    random,
    run,
    same,
)

from autoquant.formats import fitted
from autoquant.formats.moments import Moments
from autoquant.formats.refitted import Refit

pytestmark = pytest.mark.parametrize("rule", ["mse", FP8])


def drifted(tokens: int, *, seed: int, share: float = 0.3):
    """Inputs of the BF16 model and what quantized blocks make of them, both [T, K]."""
    x = inputs(tokens, seed=seed)
    return x, x + share * x @ random(INPUTS, INPUTS, seed=97) / INPUTS**0.5


def drift_of(*parts) -> tuple[Moments, Moments]:
    """Moments of z and the drift of each matrix, from pairs (x, z) to fit and held out."""
    own = moments(*(tuple(z for _, z in each) for each in parts))
    sums = [torch.stack([(x - z).mT @ z for x, z in each]) for each in parts]
    return own, Moments(sums=torch.stack(sums, dim=1), tokens=own.tokens)


def usual(count: int = 1) -> tuple[Moments, Moments]:
    return drift_of(
        *((drifted(900, seed=2 * n), drifted(300, seed=2 * n + 1)) for n in range(count))
    )


def refitted(weight, rule, own, drift):
    return run(weight, rule, own, rounding="refit", drift=drift)


def error(weight, codes, rule, x, z) -> float:
    """Mean of |W x - Q z|^2."""
    pull = weight.float() @ ((x - z).mT @ z / len(z))
    moved = harm_of(codes, weight, rule, z.mT @ z / len(z), pull=pull)
    return moved.sum().item() + (weight.float() @ (x - z).mT).square().sum().item() / len(z)


def test_harm_with_a_pull_is_the_error_to_what_the_bf16_model_gives(rule):
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    own, drift = usual()
    found, _ = refitted(weight, rule, own, drift)
    x, z = drifted(500, seed=7)
    stands_for = decoded(found, weight, rule)[0].float()
    direct = (x @ weight[0].float().mT - z @ stands_for.mT).square().sum() / len(z)
    assert error(weight, found, rule, x, z) == pytest.approx(direct.item(), rel=1e-3)


def test_refitted_codes_answer_drifted_inputs_better_than_compensated_ones(rule):
    weight = random(2, OUTPUTS, INPUTS).bfloat16()
    own, drift = usual(2)
    found, plain = refitted(weight, rule, own, drift)
    assert plain == {}
    compensated, _ = run(weight, rule, own)
    x, z = drifted(2000, seed=50)
    assert error(weight, found, rule, x, z) < 0.5 * error(weight, compensated, rule, x, z)


def test_without_drift_they_are_the_compensated_ones(rule):
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    own, drift = usual()
    none = Moments(sums=drift.sums * 0, tokens=drift.tokens)
    compensated, _ = run(weight, rule, own)
    assert same(refitted(weight, rule, own, none)[0], compensated)
    broken = Moments(sums=drift.sums * torch.inf, tokens=drift.tokens)
    assert same(refitted(weight, rule, own, broken)[0], compensated)


def test_a_step_that_does_not_help_held_out_inputs_is_not_taken(rule):
    weight = random(2, OUTPUTS, INPUTS).bfloat16()
    own, drift = usual(2)
    turned = drift.sums.clone()
    turned[1, 0] *= -1  # held out, the first matrix drifts the other way
    refit = Refit.best(weight, own, Moments(sums=turned, tokens=drift.tokens))
    assert refit.rate[0] == 0 < refit.rate[1]
    assert torch.equal(refit.refitted(slice(0, 2))[0], weight[0].float())


def test_moments_without_a_factor_take_no_step(rule):
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    own, drift = usual()
    own.sums[0, 0, 0, 1] = own.sums[0, 0, 1, 0] = 100 * own.sums[0, 0, 0, 0] + 1e6
    found, plain = refitted(weight, rule, own, drift)
    assert plain == {(0, 0): fitted._NO_FACTOR}
    assert same(found, nearest(weight, rule))


def test_codes_that_answer_held_out_inputs_worse_than_the_nearest_are_not_used(rule):
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    x, z = drifted(600, seed=1)
    other = random(200, INPUTS, seed=2)
    own, drift = drift_of(((x, z), (other, other)))
    found, plain = refitted(weight, rule, own, drift)
    assert plain == {(0, 0): fitted._DOES_HARM}
    assert same(found, nearest(weight, rule))
