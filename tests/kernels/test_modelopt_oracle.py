"""Formats and scale rules against ModelOpt's own quantizers, calibrators and packing.

See `modelopt_kernels` for how its kernels run on a CPU.
"""

from typing import Any

import autoquant_kernels as ak
import pytest
import torch
from golden.regenerate import weights
from kernel_cases import assert_same_bits
from modelopt_kernels import running_kernels
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

    with running_kernels():
        yield quantization


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
