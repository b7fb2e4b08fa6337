"""Per-tensor scales from the largest magnitude of a tensor."""

import math

import torch
from torch import Tensor

from autoquant_kernels.checks import require_rule

E2M1_MAX = 6.0
E4M3_MAX = 448.0
FOUR_OVER_SIX_MAX = 256.0
"""Largest block scale under `four_over_six`: 1.5 times it must still be an E4M3 number."""


def nvfp4_global_scale(amax: float | Tensor, rule: str = "max") -> Tensor:
    """The NVFP4 per-tensor scale RN(amax / (6 M)), M = 448, or 256 under `four_over_six`.

    It is what a checkpoint stores as `weight_scale_2` or `input_scale`.

    Args:
        amax: largest magnitude of the tensor, or of all that share the scale; 0 counts as 1.
        rule: the scale rule of the weight, `max`, `mse` or `four_over_six`.

    Returns:
        float32, 0-dimensional, on the CPU whatever the device of `amax`.

    Raises:
        ValueError: `amax` negative, infinite or NaN, or not one value; unknown `rule`.
    """
    require_rule(rule)
    largest = FOUR_OVER_SIX_MAX if rule == "four_over_six" else E4M3_MAX
    return _amax(amax) / torch.tensor(E2M1_MAX * largest)


def fp8_scale(amax: float | Tensor) -> Tensor:
    """The FP8 per-tensor scale RN(amax / 448): float32, 0-dimensional, on the CPU.

    Raises:
        ValueError: `amax` negative, infinite or NaN, or not one value.
    """
    return _amax(amax) / torch.tensor(E4M3_MAX)


def _amax(amax: float | Tensor) -> Tensor:
    if isinstance(amax, Tensor):
        if amax.numel() != 1:
            raise ValueError(f"amax has shape {tuple(amax.shape)}; it must be one value.")
        value = amax.detach().to("cpu", torch.float32).reshape(())
    else:
        value = torch.tensor(amax, dtype=torch.float32)
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f"amax is {number}; it must be finite and not negative: find the NaN or Inf first."
        )
    return value if number else torch.ones(())
