"""The formats: one file each, found by name. A search chooses among them."""

from autoquant.formats.base import (
    A16,
    CAST,
    CODES,
    GLOBAL_SCALE,
    GPTQ,
    INPUT_SCALE,
    NEAREST,
    REFIT,
    SCALAR_BYTES,
    SCALE,
    Format,
    LayoutForm,
    Part,
)
from autoquant.formats.bf16 import BF16_FORMAT
from autoquant.formats.choice import Choice, choices_of
from autoquant.formats.fp8 import FP8_FORMAT
from autoquant.formats.nvfp4 import NVFP4_BLOCK, NVFP4_FORMAT, PLAIN_RULES, ScaleRule
from autoquant.formats.registry import all_formats, find_format, register, registered

BF16 = Choice(BF16_FORMAT)
FP8 = Choice(FP8_FORMAT)
NVFP4 = Choice(NVFP4_FORMAT, ScaleRule.MAX)

__all__ = [
    "A16",
    "BF16",
    "CAST",
    "CODES",
    "FP8",
    "GLOBAL_SCALE",
    "GPTQ",
    "INPUT_SCALE",
    "NEAREST",
    "NVFP4",
    "NVFP4_BLOCK",
    "PLAIN_RULES",
    "REFIT",
    "SCALAR_BYTES",
    "SCALE",
    "Choice",
    "Format",
    "LayoutForm",
    "Part",
    "ScaleRule",
    "all_formats",
    "choices_of",
    "find_format",
    "register",
    "registered",
]
