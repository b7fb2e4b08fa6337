"""Compensated rounding: the textbook's algorithm, stored order, less harm to products."""

import autoquant_kernels as kernels
import pytest
import torch
from fitting import (
    INPUTS,
    OUTPUTS,
    RULES,
    inputs,
    nearest,
    random,
    run,
    same,
    scales,
    usual,
)

from autoquant.formats import compensated, fitted
from autoquant.formats.moments import Moments


@pytest.mark.parametrize("rule", RULES)
def test_it_does_less_harm_on_inputs_that_it_never_saw(rule):
    weight, own = random(2, OUTPUTS, INPUTS).bfloat16(), usual(2)
    found, plain = run(weight, rule, own)
    assert plain == {}
    fresh = inputs(2000, seed=50)
    harm, before = (
        one.harm(weight, scales(weight, rule), fresh.mT @ fresh, [OUTPUTS]).sum().item()
        for one in (found, nearest(weight, rule))
    )
    assert harm < 0.75 * before


def test_the_weighted_search_of_scales_does_the_least_harm():
    weight, own = random(1, OUTPUTS, INPUTS).bfloat16(), usual()
    harms = {}
    for rule in RULES:
        found, _ = run(weight, rule, own)
        harms[rule] = found.harm(weight, scales(weight, rule), own.mean(), [OUTPUTS]).item()
    assert min(harms, key=harms.__getitem__) == "hessian"
    assert harms["hessian"] < 0.8 * harms["max"]


def test_without_moments_between_columns_every_code_is_the_nearest_where_it_is_stored():
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    sizes = random(INPUTS, seed=1).square() + 0.1
    own = Moments(
        sums=torch.diag(sizes).expand(2, 1, -1, -1).clone(), tokens=torch.tensor([[900], [300]])
    )
    found, plain = run(weight, "max", own)
    assert plain == {}
    assert same(found, nearest(weight, "max"))


def test_it_is_the_textbook_algorithm():
    """In float64, column after column, without lazy blocks; blocks in the order of their inputs."""
    weight, own = random(1, OUTPUTS, INPUTS).bfloat16(), usual()
    damping = torch.tensor([0.05])
    g = scales(weight, "max")
    factor = compensated.Factor.of(own.mean(), damping)
    found = compensated.compensated(weight, g, "max", factor)
    assert factor.has_factor.all()
    h = own.mean()[0].double()
    blocks = h.diagonal().view(-1, 16).mean(dim=1).argsort(descending=True)
    order = (blocks[:, None] * 16 + torch.arange(16)).flatten()
    damped = h[order][:, order] + 0.05 * h.diagonal().mean() * torch.eye(INPUTS)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    rest, result = weight[0].double()[:, order], torch.empty(OUTPUTS, INPUTS, dtype=torch.float64)
    for column in range(INPUTS):
        if column % 16 == 0:
            largest = rest[:, column : column + 16].abs().amax(dim=1)
            scale = (largest / (6 * g)).float().to(torch.float8_e4m3fn).double() * g
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        steps = rest[:, column].abs() / scale
        code = grid[(steps[:, None] - grid).abs().argmin(dim=1)]
        result[:, column] = code * scale * rest[:, column].sign()
        error = (rest[:, column] - result[:, column]) / upper[column, column]
        rest[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    stored = torch.empty_like(result)
    stored[:, order] = result
    decoded = kernels.dequantize_nvfp4(found.codes, found.block_scale, g, dtype=torch.float32)
    assert ((decoded[0].double() - stored).abs() < 1e-6).double().mean() > 0.98


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


def test_how_many_matrices_are_worked_on_at_once_changes_nothing(monkeypatch):
    weight, own = random(3, OUTPUTS, INPUTS).bfloat16(), usual(3)
    together, _ = run(weight, "hessian", own)
    monkeypatch.setattr(fitted, "CHUNK_BYTES", 1)
    apart, _ = run(weight, "hessian", own)
    assert same(together, apart)
