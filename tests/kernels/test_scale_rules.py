"""How block scales are chosen, and what each rule gains."""

import autoquant_kernels as ak
import pytest
import torch
from autoquant_kernels import reference
from kernel_cases import five_distributions
from torch import Tensor

SHAPE = (256, 512)
DISTRIBUTIONS = five_distributions(*SHAPE)


def errors(w: Tensor, scale: Tensor) -> Tensor:
    """Squared error of every block of 16 under its scale `[blocks, 1]`."""
    return reference._squared_error(w.view(-1, 16), scale)


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
