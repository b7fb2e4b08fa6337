"""Weights that answer drifted inputs as the original ones answer the BF16 model's."""

import autoquant_kernels as kernels
import pytest
import torch
from fitting import INPUTS, OUTPUTS, inputs, moments, nearest, random, same, scales

from autoquant.formats import fitted
from autoquant.formats.fitted import fit
from autoquant.formats.moments import Moments
from autoquant.formats.refitted import Refit

RULE = "mse"


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


def run(weight, own, drift, rounding="refit", rows=(OUTPUTS,)):
    return fit(weight, scales(weight, RULE), RULE, rounding, own, rows, drift)


def error(weight, codes, x, z) -> float:
    """Mean of |W x - Q z|^2."""
    moved = codes.harm(
        weight,
        scales(weight, RULE),
        z.mT @ z / len(z),
        [OUTPUTS],
        weight.float() @ ((x - z).mT @ z / len(z)),
    )
    return moved.sum().item() + (weight.float() @ (x - z).mT).square().sum().item() / len(z)


def test_harm_with_a_pull_is_the_error_to_what_the_bf16_model_gives():
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    own, drift = usual()
    found, _ = run(weight, own, drift)
    x, z = drifted(500, seed=7)
    decoded = kernels.dequantize_nvfp4(found.codes, found.block_scale, scales(weight, RULE))
    direct = (x @ weight[0].float().mT - z @ decoded[0].float().mT).square().sum() / len(z)
    assert error(weight, found, x, z) == pytest.approx(direct.item(), rel=1e-3)


def test_refitted_codes_answer_drifted_inputs_better_than_compensated_ones():
    weight = random(2, OUTPUTS, INPUTS).bfloat16()
    own, drift = usual(2)
    found, plain = run(weight, own, drift)
    assert plain == {}
    compensated, _ = run(weight, own, None, rounding="gptq")
    x, z = drifted(2000, seed=50)
    assert error(weight, found, x, z) < 0.5 * error(weight, compensated, x, z)


def test_without_drift_they_are_the_compensated_ones():
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    own, drift = usual()
    none = Moments(sums=drift.sums * 0, tokens=drift.tokens)
    compensated, _ = run(weight, own, None, rounding="gptq")
    assert same(run(weight, own, none)[0], compensated)
    broken = Moments(sums=drift.sums * torch.inf, tokens=drift.tokens)
    assert same(run(weight, own, broken)[0], compensated)


def test_a_step_that_does_not_help_held_out_inputs_is_not_taken():
    weight = random(2, OUTPUTS, INPUTS).bfloat16()
    own, drift = usual(2)
    turned = drift.sums.clone()
    turned[1, 0] *= -1  # held out, the first matrix drifts the other way
    refit = Refit.best(weight, own, Moments(sums=turned, tokens=drift.tokens))
    assert refit.rate[0] == 0 < refit.rate[1]
    assert torch.equal(refit.refitted(slice(0, 2))[0], weight[0].float())


def test_moments_without_a_factor_take_no_step():
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    own, drift = usual()
    own.sums[0, 0, 0, 1] = own.sums[0, 0, 1, 0] = 100 * own.sums[0, 0, 0, 0] + 1e6
    found, plain = run(weight, own, drift)
    assert plain == {(0, 0): fitted._NO_FACTOR}
    assert same(found, nearest(weight, RULE))


def test_codes_that_answer_held_out_inputs_worse_than_the_nearest_are_not_used():
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    x, z = drifted(600, seed=1)
    other = random(200, INPUTS, seed=2)
    own, drift = drift_of(((x, z), (other, other)))
    found, plain = run(weight, own, drift)
    assert plain == {(0, 0): fitted._DOES_HARM}
    assert same(found, nearest(weight, RULE))
