"""Codes fitted to inputs are used where they serve inputs that they never saw, and nowhere else."""

import autoquant_kernels as kernels
import pytest
import torch
from fitting import (
    FP8,
    INPUTS,
    OUTPUTS,
    RULES,
    decoded,
    harm_of,
    inputs,
    moments,
    nearest,
    random,
    run,
    same,
    scales,
    uneven,
    usual,
)

from autoquant.formats import CODES, fitted
from autoquant.formats.moments import FEWEST_TOKENS, Moments


@pytest.mark.parametrize("rule", ["diagonal", "hessian"])
def test_weighted_scales_do_less_harm_on_inputs_that_they_never_saw(rule):
    weight = random(2, OUTPUTS, INPUTS).bfloat16()
    own = moments(*((uneven(600, seed=n), uneven(200, seed=n + 1)) for n in (1, 3)))
    found, plain = run(weight, rule, own, rounding="nearest")
    assert plain == {}
    expected = kernels.quantize_nvfp4(
        weight, scales(weight, rule), rule=rule, moments=own.of_blocks(rule)
    )
    assert torch.equal(found.parts[CODES], expected[0])
    fresh = uneven(2000, seed=50)
    harm, before = (
        harm_of(one, weight, rule, fresh.mT @ fresh).sum().item()
        for one in (found, nearest(weight, rule))
    )
    assert harm < 0.9 * before


def test_what_was_held_out_is_not_fitted_before_it_judges():
    """The diagonal of the held-out half is another; fitted to both, the codes would pass."""
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    sums = torch.stack([torch.diag(random(INPUTS, seed=n).exp())[None] for n in (1, 2)])
    own = Moments(sums=sums * 1000, tokens=torch.tensor([[1000], [1000]]))
    _, plain = run(weight, "diagonal", own, rounding="nearest")
    assert plain == {(0, 0): fitted._DOES_HARM}


@pytest.mark.parametrize("rule", ["mse", FP8])
def test_moments_without_a_factor_are_named(rule):
    x, held_out = inputs(600, seed=1), inputs(200, seed=2)
    own = moments((x, held_out))
    own.sums[0, 0, 0, 1] = own.sums[0, 0, 1, 0] = 100 * own.sums[0, 0, 0, 0] + 1e6
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    found, plain = run(weight, rule, own)
    assert plain == {(0, 0): fitted._NO_FACTOR}
    assert same(found, nearest(weight, rule))


USELESS = {
    "not finite": ("are not finite", lambda x: (x.index_fill(0, torch.tensor([3]), torch.inf), x)),
    "one token": (f"fewer than {FEWEST_TOKENS} tokens", lambda x: (x[:1], x[:0])),
    "few tokens": (f"fewer than {FEWEST_TOKENS}", lambda x: (x[:40], x[40 : FEWEST_TOKENS - 1])),
    "none held out": ("some held out", lambda x: (x, x[:0])),
    "never reached": ("showed it no tokens", lambda x: (x[:0], x[:0])),
}


@pytest.mark.parametrize("case", USELESS)
@pytest.mark.parametrize(
    ("rule", "rounding"),
    [("mse", "gptq"), ("hessian", "gptq"), ("diagonal", "nearest"), (FP8, "gptq")],
)
def test_a_matrix_without_useful_moments_has_plain_codes_and_others_have_not(case, rule, rounding):
    reason, change = USELESS[case]
    of = inputs if rounding == "gptq" else uneven
    own = moments((of(300, seed=1), of(100, seed=2)), change(of(400, seed=3)))
    weight = random(2, OUTPUTS, INPUTS).bfloat16()
    found, plain = run(weight, rule, own, rounding=rounding)
    assert list(plain) == [(1, 0)]
    assert reason in plain[1, 0]
    expected = nearest(weight, rule)
    assert torch.equal(found.parts[CODES][1], expected.parts[CODES][1])
    assert not torch.equal(found.parts[CODES][0], expected.parts[CODES][0])
    alone, nothing = run(weight[1:], rule, own.of(slice(1, 2)), rounding=rounding)
    assert list(nothing) == [(0, 0)]
    assert torch.equal(alone.parts[CODES][0], expected.parts[CODES][1])


@pytest.mark.parametrize(
    ("rule", "rounding"),
    [("max", "gptq"), ("hessian", "gptq"), ("hessian", "nearest"), (FP8, "gptq")],
)
def test_what_does_more_harm_to_held_out_inputs_is_not_used(rule, rounding):
    x, other = inputs(600, seed=1), random(200, INPUTS, seed=2)
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    found, plain = run(weight, rule, moments((x, other)), rounding=rounding)
    assert plain == {(0, 0): fitted._DOES_HARM}
    assert same(found, nearest(weight, rule))


@pytest.mark.parametrize("rule", ["mse", FP8])
def test_each_linear_of_a_matrix_is_judged_by_itself(rule):
    rows = [1] * OUTPUTS
    weight = random(1, OUTPUTS, INPUTS).bfloat16()
    own = moments((inputs(120, seed=1), inputs(200, seed=2)))
    found, plain = run(weight, rule, own, rows)
    assert 0 < len(plain) < OUTPUTS
    before = nearest(weight, rule)
    for _, row in plain:
        assert torch.equal(found.parts[CODES][0, row], before.parts[CODES][0, row])
    harms = [harm_of(one, weight, rule, own.mean(), rows)[0] for one in (found, before)]
    assert (harms[0] <= harms[1]).all()


def test_dead_channels_and_a_weight_of_zeros():
    x, held_out = inputs(600, seed=1), inputs(200, seed=2)
    x[:, 16:40], held_out[:, 16:40] = 0.0, 0.0
    weight = random(2, OUTPUTS, INPUTS).bfloat16()
    weight[1] = 0.0
    own = moments((x, held_out), (x, held_out))
    for rule in (*RULES, FP8):
        found, plain = run(weight, rule, own)
        assert plain == {}
        stands_for = decoded(found, weight, rule)
        assert not stands_for[1].any()
        dead = weight[0, :, 16:32].float(), stands_for[0, :, 16:32].float()
        assert (dead[0] - dead[1]).norm() < 0.2 * dead[0].norm()
        fresh = inputs(1000, seed=3)
        fresh[:, 16:40] = 0.0
        harm, before = (
            harm_of(one, weight, rule, fresh.mT @ fresh)[0].item()
            for one in (found, nearest(weight, rule))
        )
        assert harm < before


def test_experts_of_few_tokens_lean_on_their_layer():
    many, few = inputs(3000, seed=1), inputs(96, seed=2)
    own = moments((many, inputs(1000, seed=3)), (few, inputs(32, seed=4)))
    layer = Moments(
        sums=own.sums,
        tokens=own.tokens,
        layer_sums=own.sums.sum(dim=1),
        layer_tokens=own.tokens.sum(dim=1),
    )
    mean, alone = layer.mean(), own.mean()
    whole = own.sums.sum(dim=(0, 1)) / own.tokens.sum()
    share = 128 / (128 + INPUTS)
    assert torch.allclose(mean[1], share * alone[1] + (1 - share) * whole, rtol=1e-4, atol=1e-6)
    weight = random(2, OUTPUTS, INPUTS).bfloat16()
    fresh = inputs(4000, seed=5)
    harms = [
        harm_of(run(weight, "hessian", m)[0], weight, "hessian", fresh.mT @ fresh)[1]
        for m in (layer, own)
    ]
    assert harms[0] < 0.9 * harms[1]


def test_experts_that_share_their_layers_moments_are_fitted_to_them():
    own = usual(2)
    layer_sums, layer_tokens = own.sums.sum(dim=1), own.tokens.sum(dim=1)
    shared = Moments(
        sums=own.sums[:, :0], tokens=own.tokens, layer_sums=layer_sums, layer_tokens=layer_tokens
    )
    alone = Moments(sums=layer_sums[:, None], tokens=layer_tokens[:, None])
    weight = random(2, OUTPUTS, INPUTS).bfloat16()
    found, plain = run(weight, "hessian", shared)
    assert plain == {}
    for matrix in range(2):
        one, _ = run(weight[matrix : matrix + 1], "hessian", alone)
        assert torch.equal(found.parts[CODES][matrix], one.parts[CODES][0])
    broken = Moments(
        sums=own.sums[:, :0],
        tokens=own.tokens,
        layer_sums=layer_sums * torch.inf,
        layer_tokens=layer_tokens,
    )
    _, plain = run(weight, "hessian", broken)
    assert set(plain.values()) == {"the second moments of its inputs are not finite"}


def test_choices_of_the_same_inputs_share_factors_and_have_the_codes_of_one_alone(monkeypatch):
    weight = random(2, OUTPUTS, INPUTS).bfloat16()
    alone = {rule: run(weight, rule, usual(2))[0] for rule in ("mse", "hessian", FP8)}
    made, shared = [], usual(2)
    of = fitted.Factor.of
    monkeypatch.setattr(fitted.Factor, "of", lambda *own: made.append(own[1]) or of(*own))
    for rule in alone:
        assert same(run(weight, rule, shared)[0], alone[rule])
    assert len(made) == len(fitted.DAMPINGS) + 1
    monkeypatch.setattr(fitted, "KEPT_BYTES", 0)
    unkept = usual(2)
    assert same(run(weight, "mse", unkept)[0], alone["mse"])
    assert not unkept.kept
