"""The three weight formats, their legal shapes and what they store.

NVFP4: 16 consecutive elements of a row share an E4M3 scale, and the tensor an FP32 scale.
FP8: E4M3 with one FP32 scale per tensor. Both store an FP32 input scale.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from autoquant.errors import ConfigError

NVFP4_BLOCK = 16
"""Elements along the reduction axis that share one scale; the format fixes it."""

SCALAR_BYTES = 4
"""Every per-tensor scale is a 0-dimensional float32."""


class Format(StrEnum):
    """How a weight and its input are stored and multiplied, cheapest first."""

    NVFP4 = "nvfp4"
    FP8 = "fp8"
    BF16 = "bf16"


class ScaleRule(StrEnum):
    """How NVFP4 block scales of a weight are chosen; all rules store the same bits."""

    MAX = "max"
    MSE = "mse"
    FOUR_OVER_SIX = "four_over_six"


@dataclass(frozen=True, slots=True, order=True)
class Choice:
    """A format, and for NVFP4 the rule that chooses its block scales."""

    format: Format
    scale_rule: ScaleRule | None = None

    def __post_init__(self) -> None:
        if (self.format is Format.NVFP4) != (self.scale_rule is not None):
            raise ConfigError(
                f"format {self.format} with scale rule {self.scale_rule}: "
                "NVFP4 needs a scale rule, and only NVFP4 has one.",
                fix="write nvfp4/max, nvfp4/mse, nvfp4/four_over_six, fp8 or bf16.",
            )

    def __str__(self) -> str:
        return f"{self.format}/{self.scale_rule}" if self.scale_rule else str(self.format)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The choice written as `bf16`, `fp8`, `nvfp4` (rule `max`) or `nvfp4/mse`.

        Raises:
            ConfigError: no such format or scale rule.
        """
        name, _, rule = text.partition("/")
        try:
            kind = Format(name)
            if kind is not Format.NVFP4:
                return cls(kind, ScaleRule(rule) if rule else None)
            return cls(kind, ScaleRule(rule or "max"))
        except ValueError:
            raise ConfigError(
                f"{text!r} is not a format.",
                fix="use bf16, fp8, nvfp4, nvfp4/mse or nvfp4/four_over_six.",
            ) from None


BF16 = Choice(Format.BF16)
FP8 = Choice(Format.FP8)
NVFP4 = Choice(Format.NVFP4, ScaleRule.MAX)


def stored_bytes(format: Format, out_features: int, in_features: int) -> int:
    """Bytes of all tensors that one linear `[out_features, in_features]` stores in `format`."""
    elements = out_features * in_features
    if format is Format.BF16:
        return 2 * elements
    if format is Format.FP8:
        return elements + 2 * SCALAR_BYTES
    return elements // 2 + elements // NVFP4_BLOCK + 2 * SCALAR_BYTES


def why_illegal(format: Format, in_features: int) -> str | None:
    """Why a linear with `in_features` inputs cannot take `format`, or None if it can."""
    if format is Format.NVFP4 and in_features % NVFP4_BLOCK:
        return f"NVFP4 needs K divisible by {NVFP4_BLOCK}, and K is {in_features}"
    return None
