"""Compensated rounding: the textbook's algorithm, stored order, less harm to products."""

import pytest
import torch
from fitting import (
    FP8,
    INPUTS,
    OUTPUTS,
    RULES,
    coder,
    decoded,
    harm_of,
    inputs,
    moments,
    nearest,
    random,
    run,
    same,
    scales,
    usual,
)

from autoquant.formats import CODES, compensated, fitted
from autoquant.formats.fp8 import Fp8Coder
from autoquant.formats.moments import Moments


@pytest.mark.parametrize("rule", [*RULES, FP8])
def test_it_does_less_harm_on_inputs_that_it_never_saw(rule):
    weight, own = random(2, OUTPUTS, INPUTS).bfloat16(), usual(2)
    found, plain = run(weight, rule, own)
    assert plain == {}
    fresh = inputs(2000, seed=50)
    harm, before = (
        harm_of(one, weight, rule, fresh.mT @ fresh).sum().item()
        for one in (found, nearest(weight, rule))
    )
    assert harm < 0.75 * before


def test_the_weighted_search_of_scales_does_the_least_harm():
    weight, own = random(1, OUTPUTS, INPUTS).bfloat16(), usual()
    harms = {}
    for rule in RULES:
        found, _ = run(weight, rule, own)
        harms[rule] = harm_of(found, weight, rule, own.mean()).item()
    assert min(harms, key=harms.__getitem__) == "hessian"
    assert harms["hessian"] < 0.8 * harms["max"]


@pytest.mark.parametrize("rule", ["max", FP8])
def test_without_moments_between_columns_every_code_is_the_nearest_where_it_is_stored(rule):
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    sizes = random(INPUTS, seed=1).square() + 0.1
    own = Moments(
        sums=torch.diag(sizes).expand(2, 1, -1, -1).clone(), tokens=torch.tensor([[900], [300]])
    )
    found, plain = run(weight, rule, own)
    assert plain == {}
    assert same(found, nearest(weight, rule))


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


@pytest.mark.parametrize(("rule", "grid"), [("max", E2M1), (FP8, E4M3)])
def test_it_is_the_textbook_algorithm(rule, grid):
    """In float64, column after column, without lazy blocks; blocks in the order of their inputs."""
    weight, own = random(1, OUTPUTS, INPUTS).bfloat16(), usual()
    g = scales(weight, rule)
    factor = compensated.Factor.of(own.mean(), torch.tensor([0.05]))
    found = compensated.compensated(weight, coder(weight, rule), factor)
    assert factor.has_factor.all()
    h = own.mean()[0].double()
    blocks = h.diagonal().view(-1, 16).mean(dim=1).argsort(descending=True)
    order = (blocks[:, None] * 16 + torch.arange(16)).flatten()
    damped = h[order][:, order] + 0.05 * h.diagonal().mean() * torch.eye(INPUTS)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    rest, result = weight[0].double()[:, order], torch.empty(OUTPUTS, INPUTS, dtype=torch.float64)
    scale = g.double().expand(OUTPUTS)
    for column in range(INPUTS):
        if column % 16 == 0 and rule is not FP8:
            largest = rest[:, column : column + 16].abs().amax(dim=1)
            scale = (largest / (6 * g)).float().to(torch.float8_e4m3fn).double() * g
        steps = rest[:, column].abs() / scale
        code = grid[(steps[:, None] - grid).abs().argmin(dim=1)]
        result[:, column] = code * scale * rest[:, column].sign()
        error = (rest[:, column] - result[:, column]) / upper[column, column]
        rest[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    stored = torch.empty_like(result)
    stored[:, order] = result
    ours = decoded(found, weight, rule)[0].double()
    is_same = (ours - stored).abs() <= 2**-8 * stored.abs()  # BF16 keeps eight bits
    assert is_same.double().mean() > 0.98


def test_fp8_takes_a_last_block_that_is_not_whole():
    width = 40
    x, held_out = inputs(600, seed=1, width=width), inputs(200, seed=2, width=width)
    weight, own = random(1, OUTPUTS, width).bfloat16(), moments((x, held_out))
    found, plain = run(weight, FP8, own)
    assert plain == {}
    fresh = inputs(2000, seed=3, width=width)
    harm, before = (
        harm_of(one, weight, FP8, fresh.mT @ fresh).item() for one in (found, nearest(weight, FP8))
    )
    assert harm < 0.75 * before
    idle = torch.zeros(1, OUTPUTS, 8).bfloat16()
    wider = Moments(sums=torch.nn.functional.pad(own.sums, (0, 8, 0, 8)), tokens=own.tokens)
    filled, _ = run(torch.cat((weight, idle), dim=2), FP8, wider)
    assert torch.equal(decoded(filled, weight, FP8)[..., :width], decoded(found, weight, FP8))


def test_fp8_weights_that_errors_push_beyond_the_largest_code_saturate():
    """Two inputs are the same: the second takes over what the first loses, as far as it can."""
    x = inputs(600, seed=1)
    x[:, 1] = x[:, 0]
    h = (x.mT @ x / len(x))[None]
    weight = torch.zeros(1, 1, INPUTS).bfloat16()
    weight[0, 0, :2] = torch.tensor([1.0, 0.25])
    factor = compensated.Factor.of(h, torch.tensor([1e-4]))
    own = Fp8Coder(torch.tensor([0.5 / 448]))
    codes = compensated.compensated(weight, own, factor).parts[CODES].float()
    assert codes[0, 0, :2].tolist() == [448.0, 448.0]
    assert codes.isfinite().all()


def test_the_factor_is_that_of_the_inverse():
    own = usual(2).mean()
    upper, has_factor = compensated._factor(own, torch.tensor([0.01, 0.1]))
    upper = upper.double()
    assert has_factor.tolist() == [True, True]
    for number, damping in enumerate((0.01, 0.1)):
        damped = own[number].double()
        damped += damping * damped.diagonal().mean() * torch.eye(INPUTS)
        assert torch.equal(upper[number], upper[number].triu())
        inverse = upper[number].mT @ upper[number]
        assert torch.allclose(inverse @ damped, torch.eye(INPUTS).double(), atol=1e-4)


def test_moments_without_a_factor_carry_nothing():
    broken = -torch.eye(INPUTS)[None]
    upper, has_factor = compensated._factor(broken, torch.tensor([0.01]))
    assert torch.equal(upper, torch.eye(INPUTS)[None])
    assert has_factor.tolist() == [False]


@pytest.mark.parametrize("rule", ["hessian", FP8])
def test_how_many_matrices_are_worked_on_at_once_changes_nothing(monkeypatch, rule):
    weight, own = random(3, OUTPUTS, INPUTS).bfloat16(), usual(3)
    together, _ = run(weight, rule, own)
    monkeypatch.setattr(fitted, "CHUNK_BYTES", 1)
    apart, _ = run(weight, rule, own)
    assert same(together, apart)
