"""NVFP4: 16 consecutive weights of a row share an E4M3 scale, and the tensor a float32 scale."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from autoquant.formats.base import (
    A16,
    CAST,
    CODES,
    GLOBAL_SCALE,
    GPTQ,
    INPUT_SCALE,
    NEAREST,
    REFIT,
    SCALE,
    Coder,
    Format,
    LayoutForm,
    Part,
    Parts,
)
from autoquant.formats.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from autoquant.formats.choice import Choice
    from autoquant.formats.moments import Moments
    from autoquant.formats.packed import Packed, Statistics

NVFP4_BLOCK = 16
"""Elements along the reduction axis that share one scale; the format fixes it."""


class ScaleRule(StrEnum):
    """How block scales of a weight are chosen; all rules store the same bits."""

    MAX = "max"
    MSE = "mse"
    FOUR_OVER_SIX = "four_over_six"
    DIAGONAL = "diagonal"
    HESSIAN = "hessian"
    """The last two weigh errors by second moments of the inputs, of each column or of each pair."""


PLAIN_RULES = (ScaleRule.MAX, ScaleRule.MSE, ScaleRule.FOUR_OVER_SIX)
"""Those that look at the weight alone."""


RULE_WITHOUT_INPUTS = ScaleRule.MSE
"""The scale rule of a linear that a rule weighted by inputs does not serve."""


@dataclass(frozen=True, slots=True, eq=False)
class Nvfp4Coder(Coder):
    """Codes and block scales."""

    rule: str
    """How block scales are chosen."""

    def plain(self, weight: "Tensor") -> Parts:
        """Under the coder's rule, or under one that needs no inputs."""
        return self._nearest(weight, self.rule if self.rule in PLAIN_RULES else RULE_WITHOUT_INPUTS)

    def weighted(self, weight: "Tensor", moments: "Moments", tokens: slice) -> Parts:
        """Under the coder's rule."""
        return self._nearest(weight, self.rule, moments.of_blocks(self.rule, tokens))

    def compensate(self, columns: "Tensor", upper: "Tensor") -> "tuple[Parts, Tensor]":
        """See `autoquant_kernels.compensate_nvfp4`: a block's scale is chosen at its turn."""
        import autoquant_kernels as kernels

        codes, scales, errors = kernels.compensate_nvfp4(columns, upper, self.scale, rule=self.rule)
        return {CODES: codes, SCALE: scales}, errors

    def decode(self, parts: Parts) -> "Tensor":
        """See `autoquant_kernels.dequantize_nvfp4`."""
        import autoquant_kernels as kernels

        return kernels.dequantize_nvfp4(parts[CODES], parts[SCALE], self.scale)

    def _nearest(self, weight: "Tensor", rule: str, moments: "Tensor | None" = None) -> Parts:
        import autoquant_kernels as kernels

        codes, scales = kernels.quantize_nvfp4(weight, self.scale, rule=rule, moments=moments)
        return {CODES: codes, SCALE: scales}


class Nvfp4(Format):
    """E2M1 codes; inputs in NVFP4 too, or in BF16 (`a16`), which costs no byte."""

    name = "nvfp4"
    weight_bits = 4 + Fraction(8, NVFP4_BLOCK)
    input_bits = 4
    scale_rules = (*map(str, ScaleRule), CAST)
    roundings = (NEAREST, GPTQ, REFIT)
    tensor_scale = GLOBAL_SCALE
    inputs = (None, A16)
    kept_codes = "F4"
    layouts: ClassVar[Mapping[str, LayoutForm]] = {
        "modelopt": LayoutForm(
            names={
                CODES: ".weight",
                SCALE: ".weight_scale",
                GLOBAL_SCALE: ".weight_scale_2",
                INPUT_SCALE: ".input_scale",
            },
            declared={
                "algorithm": {None: "NVFP4", A16: "W4A16_NVFP4"},
                "group_size": NVFP4_BLOCK,
                "numbers": {
                    "dynamic": False,
                    "num_bits": 4,
                    "type": "float",
                    "group_size": NVFP4_BLOCK,
                },
                "quantizer": {
                    "num_bits": [2, 1],
                    "block_sizes": {-1: NVFP4_BLOCK, "type": "dynamic", "scale_bits": [4, 3]},
                    "effective_bits": 4.5,
                },
                "presets": {
                    "NVFP4_DEFAULT_CFG": "nvfp4/max",
                    "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG": "nvfp4/mse",
                    "NVFP4_FOUR_OVER_SIX_CFG": "nvfp4/four_over_six",
                    "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG": "nvfp4/hessian",
                    "W4A16_NVFP4_CFG": "nvfp4/max/a16",
                },
                "near": ("NVFP4_AWQ_LITE_CFG", "NVFP4_AWQ_CLIP_CFG", "NVFP4_AWQ_FULL_CFG"),
            },
        ),
        "compressed-tensors": LayoutForm(
            names={
                CODES: ".weight_packed",
                SCALE: ".weight_scale",
                GLOBAL_SCALE: ".weight_global_scale",
                INPUT_SCALE: ".input_global_scale",
            },
            scalar_shape=(1,),
            reciprocals=frozenset({GLOBAL_SCALE, INPUT_SCALE}),
            declared={
                "format": "nvfp4-pack-quantized",
                "weights": {
                    "num_bits": 4,
                    "type": "float",
                    "strategy": "tensor_group",
                    "group_size": NVFP4_BLOCK,
                    "symmetric": True,
                    "dynamic": False,
                    "scale_dtype": "torch.float8_e4m3fn",
                },
                "input_activations": {"dynamic": "local"},
            },
        ),
    }

    def why_illegal(self, out_features: int, in_features: int) -> str | None:
        """Blocks of 16 run along K."""
        if in_features % NVFP4_BLOCK:
            return f"NVFP4 needs K divisible by {NVFP4_BLOCK}, and K is {in_features}"
        return None

    def parts(self, out_features: int, in_features: int, choice: "Choice") -> Mapping[str, Part]:
        """Two codes a byte, a scale for each block, and float32 scales."""
        weight = {
            CODES: Part("U8", (out_features, in_features // 2)),
            SCALE: Part("F8_E4M3", (out_features, in_features // NVFP4_BLOCK)),
            GLOBAL_SCALE: Part("F32", ()),
        }
        return weight if choice.keeps_input else weight | {INPUT_SCALE: Part("F32", ())}

    def needs_moments(self, choice: "Choice") -> bool:
        """Compensated rounding does, and a scale rule that weighs by inputs."""
        return choice.rounding != NEAREST or choice.scale_rule not in (*PLAIN_RULES, CAST)

    def encode(self, weight: "Tensor", choice: "Choice", statistics: "Statistics") -> "Packed":
        """See `autoquant_kernels.quantize_nvfp4` for the arithmetic of each scale rule."""
        import autoquant_kernels as kernels

        from autoquant.formats.packed import Packed

        assert choice.scale_rule is not None
        experts = len(weight) if weight.ndim == 3 else None
        if choice.is_cast:
            from autoquant.formats import cast

            scale = cast.nvfp4_scale(statistics.weight_amax)
            codes, block_scale = cast.to_nvfp4(weight, scale)
            return Packed(choice, {CODES: codes, SCALE: block_scale, GLOBAL_SCALE: scale}, experts)
        scale = kernels.nvfp4_global_scale(statistics.weight_amax, choice.scale_rule)
        if self.needs_moments(choice):
            from autoquant.formats import fitted

            return fitted.encode(weight, choice, statistics, scale)
        codes, block_scale = kernels.quantize_nvfp4(weight, scale, rule=choice.scale_rule)
        return Packed(choice, {CODES: codes, SCALE: block_scale, GLOBAL_SCALE: scale}, experts)

    def coder(self, choice: "Choice", scale: "Tensor") -> Coder:
        """Of the choice's scale rule."""
        assert choice.scale_rule is not None
        return Nvfp4Coder(scale, choice.scale_rule)

    def decode(self, packed: "Packed", out: "Tensor | None" = None) -> "Tensor":
        """See `autoquant_kernels.dequantize_nvfp4`."""
        import autoquant_kernels as kernels

        parts = packed.parts
        return kernels.dequantize_nvfp4(parts[CODES], parts[SCALE], parts[GLOBAL_SCALE], out=out)

    def input_scale(self, amax: float) -> float:
        """amax / (6 * 448) in float32."""
        import autoquant_kernels as kernels

        return kernels.nvfp4_global_scale(amax).item()

    def input(self, x: "Tensor", scale: float) -> "Tensor":
        """Block scales are dynamic, as hardware takes them; see `fake_quant_nvfp4`."""
        import autoquant_kernels as kernels

        return kernels.fake_quant_nvfp4(x, scale)


NVFP4_FORMAT = register(Nvfp4())
