"""Formats and scale rules against ModelOpt's own quantizers, calibrators and packing.

Everything here runs on a CPU, where ModelOpt asserts CUDA for its NVFP4 kernels. Its kernels are
Triton's, so Triton's interpreter runs them, with two repairs of the interpreter: it rounds halves
of E4M3 up instead of to even, and it cannot call the CUDA library's `isnan`; and the kernel that
takes a program for each block is put together from ModelOpt's kernel that rounds 1,024 numbers at
once. On a GPU nothing is repaired.
"""

import contextlib
from types import SimpleNamespace
from typing import Any

import autoquant_kernels as ak
import numpy as np
import pytest
import torch
from golden.regenerate import weights
from kernel_cases import assert_same_bits
from torch import Tensor, nn

pytestmark = pytest.mark.slow
pytest.importorskip("triton", reason="triton is not installed")

WEIGHTS = weights()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS = {
    "max": "NVFP4_DEFAULT_CFG",
    "mse": "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
    "four_over_six": "NVFP4_FOUR_OVER_SIX_CFG",
}


@pytest.fixture(scope="module")
def mtq() -> Any:
    """`modelopt.torch.quantization`, with kernels that run where there is no GPU."""
    import modelopt.torch.quantization as quantization

    if torch.cuda.is_available():
        yield quantization
        return
    with pytest.MonkeyPatch.context() as patch:
        _interpret(patch)
        yield quantization


def _interpret(patch: pytest.MonkeyPatch) -> None:
    import modelopt.torch.kernels.quantization.gemm as gemm
    from modelopt.torch.kernels.quantization.common import nvfp4_quant
    from modelopt.torch.kernels.quantization.gemm import fp4_kernel, fp4_kernel_hopper
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def to_nearest_even(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.name == "fp32" and target.name == "fp8e4nv":
            codes = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn)
            return codes.view(torch.uint8).numpy()
        return convert(values, source, target, rounding)

    patch.setattr(interpreter, "_convert_float", to_nearest_even)
    patch.setattr(nvfp4_quant, "libdevice", SimpleNamespace(isnan=lambda x: x != x))
    patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    patch.setattr(gemm, "IS_AVAILABLE", True)
    kernel = fp4_kernel_hopper.fp4_fake_quant_block
    patch.setattr(gemm, "fp4_fake_quant_block", kernel, raising=False)

    def in_few_programs(
        x: Tensor,
        amax: Tensor,
        global_amax: Tensor | None = None,
        quantize_block_scales: bool = True,
        fp8_max_for_normalization: float = 448.0,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """`static_blockwise_fp4_fake_quant`, whose kernel is one program for each block."""
        scale = fp4_kernel.compute_fp4_scales(
            amax, global_amax, quantize_block_scales, fp8_max_for_normalization
        ).view(-1, 1)
        safe = torch.where(scale == 0, 1.0, scale)
        blocks = x.float().view(len(scale), -1)
        y = fp4_kernel.static_blockwise_fp4_cast(blocks / safe) * safe
        return torch.where(scale == 0, 0.0, y).view(x.shape).to(out_dtype or x.dtype)

    patch.setattr(gemm, "static_blockwise_fp4_fake_quant", in_few_programs, raising=False)


def quantized(mtq: Any, config: str, w: Tensor) -> Any:
    """A linear of these weights under ModelOpt's own calibration."""
    model = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False)).to(DEVICE, w.dtype)
    model[0].weight.data.copy_(w)
    inputs = torch.ones(1, w.shape[1], dtype=w.dtype, device=DEVICE)
    with torch.no_grad():
        # ModelOpt calibrates with quantization off, then, for `mse`, on weights alone.
        mtq.quantize(model, getattr(mtq, config), lambda m: m(inputs))
    return model[0]


def exported(linear: Any) -> dict[str, Tensor]:
    """What ModelOpt's exporter stores for the linear."""
    from modelopt.torch.export.unified_export_hf import _export_quantized_weight

    _export_quantized_weight(linear, torch.bfloat16)
    names = ("weight", "weight_scale", "weight_scale_2")
    return {
        name: t.detach().cpu() for name in names if (t := getattr(linear, name, None)) is not None
    }


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rule", CONFIGS)
def test_nvfp4_weights_are_those_of_modelopts_calibration_and_export(
    rule: str, name: str, mtq: Any
) -> None:
    """Bit for bit, but for the block scale of a block of zeros: ours is 1, and times zero."""
    w = WEIGHTS[name]
    theirs = exported(quantized(mtq, CONFIGS[rule], w))
    g = ak.nvfp4_global_scale(w.abs().max(), rule)
    codes, scales = ak.quantize_nvfp4(w, g, rule=rule)
    assert_same_bits(theirs["weight_scale_2"], g)
    assert_same_bits(theirs["weight"], codes)
    zeros = (w.view(len(w), -1, 16) == 0).all(-1)
    ours, other = scales.view(torch.uint8), theirs["weight_scale"].view(torch.uint8)
    assert torch.equal(ours[~zeros], other[~zeros])
    assert torch.equal(scales[zeros].float(), torch.ones(int(zeros.sum())))


@pytest.mark.parametrize("name", ["log_normal", "wide"])
@pytest.mark.parametrize("rule", ["mse", "four_over_six"])
def test_static_fake_quantization_differs_in_the_last_place_of_a_scale_alone(
    rule: str, name: str, mtq: Any
) -> None:
    """ModelOpt multiplies by 1 / (448 / s) where its own export stores s; that may tip a tie.

    Blocks under the smallest E4M3 scale are zeros there, and that scale's numbers in the export.
    """
    w = WEIGHTS[name].float()
    linear = quantized(mtq, CONFIGS[rule], w)
    theirs = linear.weight_quantizer(linear.weight).detach().cpu()
    g = ak.nvfp4_global_scale(w.abs().max(), rule)
    _, scales = ak.quantize_nvfp4(w, g, rule=rule)
    stored = scales.float().repeat_interleave(16, dim=1)
    quotients = w.abs() / (stored * g)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    tied = ((quotients[..., None] / middles - 1).abs() <= 2.0**-22).any(-1)
    ours = ak.fake_quant_nvfp4_weight(w, g, rule=rule)
    smallest = stored == 2.0**-9
    alike = ~(tied | smallest)
    torch.testing.assert_close(theirs[alike], ours[alike], rtol=2.0**-22, atol=0.0)
    assert torch.where(smallest & (theirs != 0), theirs / ours - 1, 0.0).abs().max() <= 2.0**-22


@pytest.mark.parametrize("name", WEIGHTS)
def test_inputs_are_rounded_as_modelopts_kernel_rounds_them(name: str, mtq: Any) -> None:
    """Bit for bit, but for blocks that ModelOpt cuts off: scales under 1e-5 count as 1 there."""
    from modelopt.torch.kernels.quantization import gemm

    x = WEIGHTS[name].to(DEVICE)
    amax = x.float().abs().max()
    g = ak.nvfp4_global_scale(amax)
    theirs = gemm.fp4_fake_quant_block(x.float(), amax).cpu()
    ours = ak.fake_quant_nvfp4(x.cpu().float(), g)
    largest = x.cpu().float().view(len(x), -1, 16).abs().amax(-1)
    cut_off = ((largest / (6 * g)).to(torch.float8_e4m3fn).float() * g < 1e-5).repeat_interleave(
        16, dim=1
    )
    assert cut_off.any() == (name == "wide")
    assert torch.equal(theirs[~cut_off], ours[~cut_off])
    assert not theirs[cut_off].any()


@pytest.mark.parametrize("name", WEIGHTS)
def test_fp8_is_modelopts_but_for_its_double_rounding(name: str, mtq: Any) -> None:
    """The scale and the fake quantization bit for bit; exported codes round the quotient twice."""
    w = WEIGHTS[name]
    linear = quantized(mtq, "FP8_DEFAULT_CFG", w)
    scored = linear.weight_quantizer(linear.weight).detach().cpu()
    theirs = exported(linear)
    scale = ak.fp8_scale(w.abs().max())
    ours = ak.quantize_fp8(w, scale)
    assert_same_bits(theirs["weight_scale"].float().reshape(()), scale)
    assert torch.equal(scored, ak.dequantize_fp8(ours, scale))
    twice = (w.float() / scale).bfloat16().to(torch.float8_e4m3fn)
    assert torch.equal(theirs["weight"].view(torch.uint8), twice.view(torch.uint8))
