"""Weights, and moments of correlated inputs to fit codes to."""

import autoquant_kernels as kernels
import torch
from torch import Tensor

from autoquant.formats.fitted import fit, plain_codes
from autoquant.formats.moments import Moments
from autoquant.formats.rounded import Rounded

RULES = ("max", "mse", "four_over_six", "diagonal", "hessian")
INPUTS, OUTPUTS = 160, 24


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, *, seed: int, width: int = INPUTS) -> Tensor:
    """Correlated inputs [T, K] of channels of very different size, the largest in the middle."""
    mixing = random(width, width, seed=99) / width**0.5 + torch.eye(width)
    sizes = torch.linspace(-2, 2, width).square().neg().exp()
    return (random(tokens, width, seed=seed) @ mixing) * sizes


def uneven(tokens: int, *, seed: int) -> Tensor:
    """Independent inputs [T, K] of channels whose sizes differ inside every block."""
    return random(tokens, INPUTS, seed=seed) * random(INPUTS, seed=98).exp()


def moments(*parts: tuple[Tensor, Tensor]) -> Moments:
    """Of each matrix from its inputs to fit and those held out."""
    sums = torch.stack([torch.stack([x.mT @ x for x in own]) for own in parts], dim=1)
    return Moments(sums=sums, tokens=torch.tensor([[len(x) for x in own] for own in parts]).mT)


def usual(count: int = 1) -> Moments:
    return moments(*((inputs(600, seed=2 * n), inputs(200, seed=2 * n + 1)) for n in range(count)))


def scales(weight: Tensor, rule: str) -> Tensor:
    return kernels.nvfp4_global_scale(weight.float().abs().amax((1, 2)), rule)


def nearest(weight: Tensor, rule: str) -> Rounded:
    return plain_codes(weight, scales(weight, rule), rule)


def run(
    weight: Tensor, rule: str, own: Moments, rows: list[int] | None = None, rounding: str = "gptq"
):
    return fit(weight, scales(weight, rule), rule, rounding, own, rows or [weight.shape[1]])


def same(one: Rounded, other: Rounded) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(
        one.block_scale.view(torch.uint8), other.block_scale.view(torch.uint8)
    )
