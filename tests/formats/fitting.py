"""Weights, and moments of correlated inputs to fit codes to."""

import autoquant_kernels as kernels
import torch
from torch import Tensor

from autoquant.formats import Choice
from autoquant.formats.base import Coder
from autoquant.formats.fitted import fit
from autoquant.formats.moments import Moments
from autoquant.formats.rounded import Rounded, harm

RULES = ("max", "mse", "four_over_six", "diagonal", "hessian")
FP8 = None
"""In place of a scale rule: codes in FP8, which has none."""
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


def scales(weight: Tensor, rule: str | None) -> Tensor:
    largest = weight.float().abs().amax((1, 2))
    return kernels.fp8_scale(largest) if rule is FP8 else kernels.nvfp4_global_scale(largest, rule)


def coder(weight: Tensor, rule: str | None) -> Coder:
    """Of NVFP4 under a scale rule; of FP8 without one."""
    choice = Choice.parse("fp8" if rule is FP8 else f"nvfp4/{rule}")
    return choice.format.coder(choice, scales(weight, rule))


def nearest(weight: Tensor, rule: str | None) -> Rounded:
    return Rounded(coder(weight, rule).plain(weight))


def decoded(codes: Rounded, weight: Tensor, rule: str | None) -> Tensor:
    return coder(weight, rule).decode(codes.parts)


def harm_of(
    codes: Rounded,
    weight: Tensor,
    rule: str | None,
    second_moments: Tensor,
    rows: list[int] | None = None,
    pull: Tensor | None = None,
) -> Tensor:
    stands_for = decoded(codes, weight, rule)
    return harm(weight, stands_for, second_moments, rows or [weight.shape[1]], pull)


def run(
    weight: Tensor,
    rule: str | None,
    own: Moments,
    rows: list[int] | None = None,
    rounding: str = "gptq",
    drift: Moments | None = None,
):
    return fit(weight, coder(weight, rule), rounding, own, rows or [weight.shape[1]], drift)


def same(one: Rounded, other: Rounded) -> bool:
    return one.parts.keys() == other.parts.keys() and all(
        torch.equal(part.view(torch.uint8), other.parts[name].view(torch.uint8))
        for name, part in one.parts.items()
    )
