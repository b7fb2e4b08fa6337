"""How block scales are chosen, and what each rule gains."""

import autoquant_kernels as ak
import pytest
import torch
from autoquant_kernels import reference
from kernel_cases import five_distributions, moments_of
from torch import Tensor

SHAPE = (256, 512)
DISTRIBUTIONS = five_distributions(*SHAPE)


def errors(w: Tensor, scale: Tensor) -> Tensor:
    """Squared error of every block of 16 under its scale `[blocks, 1]`."""
    return reference._error(w.view(-1, 16), scale)


def weighted_errors(w: Tensor, decoded: Tensor, moments: Tensor) -> Tensor:
    """What the rounding of each block of 16 does to a product with its inputs, float64."""
    d = (decoded.double() - w.double()).view(len(w), -1, 1, 16)
    full = moments if moments.ndim == 3 else torch.diag_embed(moments)
    return (d @ full.double() @ d.mT).flatten()


def test_global_scale_of_nothing_is_that_of_one() -> None:
    for rule in ("max", "mse", "four_over_six"):
        assert ak.nvfp4_global_scale(0.0, rule) == ak.nvfp4_global_scale(1.0, rule)
    assert ak.fp8_scale(0.0) == ak.fp8_scale(1.0)


def test_global_scales_are_rounded_once() -> None:
    amax = torch.tensor(0.10595703125)
    assert ak.nvfp4_global_scale(amax) == amax / torch.tensor(2688.0)
    assert ak.nvfp4_global_scale(amax, "four_over_six") == amax / torch.tensor(1536.0)
    assert ak.fp8_scale(amax) == amax / torch.tensor(448.0)


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
def test_the_window_loses_nothing_against_all_126_scales(name: str) -> None:
    w = DISTRIBUTIONS[name].bfloat16().float()
    g = ak.nvfp4_global_scale(w.abs().max(), "mse")
    every = torch.arange(1, 127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    least = torch.stack([errors(w, (e * g).expand(w.numel() // 16, 1)) for e in every]).amin(0)
    _, scales = ak.quantize_nvfp4(w, g, rule="mse")
    assert torch.equal(errors(w, scales.float().view(-1, 1) * g), least)


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
def test_no_rule_is_worse_than_max(name: str) -> None:
    w = DISTRIBUTIONS[name]
    found = {}
    for rule in ("max", "mse", "four_over_six"):
        g = ak.nvfp4_global_scale(w.abs().max(), rule)
        found[rule] = (ak.fake_quant_nvfp4_weight(w, g, rule=rule) - w).square().mean().item()
    assert found["mse"] < 0.9 * found["max"]
    assert found["four_over_six"] < found["max"]


def test_four_over_six_takes_four_only_if_strictly_better() -> None:
    g = 2.0**-4
    fits_six, fits_four = torch.full((16,), 1.0), torch.full((16,), 1.0)
    fits_six[:3] = torch.tensor([6.0, 4.0, 3.0])
    fits_four[:3] = torch.tensor([4.0, 3.0, 2.0])
    w = torch.stack((fits_six, fits_four)) * 8 * g
    _, scales = ak.quantize_nvfp4(w, g, rule="four_over_six")
    assert scales.float().flatten().tolist() == [8.0, 8.0]


def test_a_block_of_zeros_has_scale_one() -> None:
    for rule in ("max", "mse", "four_over_six"):
        codes, scales = ak.quantize_nvfp4(torch.zeros(1, 16), 1.0, rule=rule)
        assert scales.float().item() == 1.0
        assert not codes.any()


@pytest.mark.parametrize("rule", ["diagonal", "hessian"])
@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
def test_weighted_rules_lose_little_against_all_126_scales(name: str, rule: str) -> None:
    w = DISTRIBUTIONS[name][:64].bfloat16()
    g, moments = ak.nvfp4_global_scale(w.abs().max()), moments_of(rule, w.shape[1])
    every = torch.arange(1, 127).to(torch.uint8).view(torch.float8_e4m3fn).float() * g
    blocks = w.float().view(-1, 16)
    rounded = (reference._nearest(blocks, scale.view(1, 1)).view(w.shape) for scale in every)
    least = torch.stack([weighted_errors(w, own, moments) for own in rounded]).amin(dim=0)
    own = ak.fake_quant_nvfp4_weight(w.float(), g, rule=rule, moments=moments)
    found = weighted_errors(w, own, moments)
    assert (found >= 0.999 * least).all()
    assert found.sum() <= 1.03 * least.sum()
    mse = ak.fake_quant_nvfp4_weight(w.float(), g, rule="mse")
    assert found.sum() < weighted_errors(w, mse, moments).sum()


def test_equal_moments_weigh_nothing() -> None:
    w = DISTRIBUTIONS["normal"]
    g, blocks = ak.nvfp4_global_scale(w.abs().max()), w.shape[1] // 16
    expected = ak.quantize_nvfp4(w, g, rule="mse")
    for rule, moments in (
        ("diagonal", torch.ones(blocks, 16)),
        ("hessian", torch.eye(16).expand(blocks, 16, 16)),
    ):
        found = ak.quantize_nvfp4(w, g, rule=rule, moments=moments)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1].view(torch.uint8), expected[1].view(torch.uint8))


def test_every_row_of_blocks_has_the_moments_of_its_columns() -> None:
    w = DISTRIBUTIONS["normal"][:8]
    g, moments = ak.nvfp4_global_scale(w.abs().max()), moments_of("hessian", w.shape[1])
    codes, scales = ak.quantize_nvfp4(w, g, rule="hessian", moments=moments)
    for number in (0, 1, moments.shape[0] - 1):
        columns = slice(16 * number, 16 * number + 16)
        own = ak.quantize_nvfp4(
            w[:, columns], g, rule="hessian", moments=moments[number : number + 1]
        )
        assert torch.equal(own[0], codes[:, 8 * number : 8 * number + 8])
        assert torch.equal(own[1].float(), scales[:, number : number + 1].float())
