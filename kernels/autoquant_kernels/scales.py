"""Scales of whole matrices from their largest magnitudes."""

import math

import torch
from torch import Tensor

from autoquant_kernels.checks import require_rule

E2M1_MAX = 6.0
E4M3_MAX = 448.0
FOUR_OVER_SIX_MAX = 256.0
"""Largest block scale under `four_over_six`: 1.5 times it must still be an E4M3 number."""


def nvfp4_global_scale(amax: float | Tensor, rule: str = "max") -> Tensor:
    """The NVFP4 global scale RN(amax / (6 M)), M = 448, or 256 under `four_over_six`.

    It is what a checkpoint stores as `weight_scale_2` or `input_scale`.

    Args:
        amax: largest magnitude of the tensor, or of all that share the scale; 0 counts as 1.
            `[E]` for one scale per matrix.
        rule: the scale rule of the weight, `max`, `mse` or `four_over_six`.

    Returns:
        float32 of the shape of `amax`, on the CPU whatever its device.

    Raises:
        ValueError: `amax` negative, infinite or NaN, or of two dimensions; unknown `rule`.
    """
    require_rule(rule)
    largest = FOUR_OVER_SIX_MAX if rule == "four_over_six" else E4M3_MAX
    return _amax(amax) / torch.tensor(E2M1_MAX * largest)


def fp8_scale(amax: float | Tensor) -> Tensor:
    """The FP8 scale RN(amax / 448): float32 of the shape of `amax`, on the CPU.

    Raises:
        ValueError: `amax` negative, infinite or NaN, or of two dimensions.
    """
    return _amax(amax) / torch.tensor(E4M3_MAX)


def _amax(amax: float | Tensor) -> Tensor:
    value = torch.as_tensor(amax, dtype=torch.float32, device="cpu").detach()
    if value.ndim > 1:
        raise ValueError(
            f"amax has shape {tuple(value.shape)}; it must be one value, or one per matrix."
        )
    for number in value.reshape(-1).tolist():
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(
                f"amax is {number}; it must be finite and not negative: find the NaN or Inf first."
            )
    return torch.where(value == 0, 1.0, value)
