"""The arithmetic against other people's: ml_dtypes, compressed-tensors, and ModelOpt's exports."""

from pathlib import Path

import autoquant_kernels as ak
import numpy as np
import pytest
import torch
from autoquant_kernels import reference
from kernel_cases import assert_same_bits
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = load_file(Path(__file__).parent / "golden" / "modelopt.safetensors")
NAMES = sorted(name.removesuffix(".weight") for name in GOLDEN if name.endswith(".weight"))


def candidates() -> Tensor:
    """All bfloat16 numbers, and float32 numbers around every midpoint of both formats."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    steps = torch.arange(1, 4096) / 64
    near = torch.cat((steps, torch.nextafter(steps, torch.tensor(torch.inf)), steps / 1024))
    return torch.cat((every, near, -near))


def test_e2m1_rounds_as_ml_dtypes_does() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    v = candidates()
    v = v[~v.isnan()]
    expected = v.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(reference.round_e2m1(v).numpy(), expected)


def test_e4m3_rounds_as_ml_dtypes_and_torch_do() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    v = candidates()
    v = v[~v.isnan()].clamp(-448, 448)
    got = reference.round_e4m3(v)
    assert np.array_equal(got, v.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert torch.equal(got, v.to(torch.float8_e4m3fn).float())


def test_compressed_tensors_reads_our_codes() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    w = GOLDEN["wide.weight"]
    g = ak.nvfp4_global_scale(w.abs().max())
    codes, scales = ak.quantize_nvfp4(w, g)
    numbers = helpers.unpack_fp4_from_uint8(codes, *w.shape, dtype=torch.float32)
    scaled = numbers.view(-1, 16) * (scales.float() * g).view(-1, 1)
    expected = scaled.view(w.shape).bfloat16()
    assert torch.equal(ak.dequantize_nvfp4(codes, scales, g), expected)


@pytest.mark.parametrize("name", NAMES)
def test_nvfp4_weights_equal_the_export_of_modelopt(name: str) -> None:
    w = GOLDEN[f"{name}.weight"]
    g = ak.nvfp4_global_scale(w.abs().max())
    codes, scales = ak.quantize_nvfp4(w, g)
    assert_same_bits(GOLDEN[f"{name}.global_scale"], g)
    assert_same_bits(GOLDEN[f"{name}.block_scale"], scales.view(torch.uint8))
    assert_same_bits(GOLDEN[f"{name}.codes"], codes)


@pytest.mark.parametrize("name", NAMES)
def test_fp8_differs_from_modelopt_only_by_its_double_rounding(name: str) -> None:
    w = GOLDEN[f"{name}.weight"]
    scale = ak.fp8_scale(w.abs().max())
    assert_same_bits(GOLDEN[f"{name}.fp8_scale"], scale)
    ours, theirs = ak.quantize_fp8(w, scale), GOLDEN[f"{name}.fp8"]
    quotient = w.float() / scale
    once = quotient.to(torch.float8_e4m3fn).view(torch.uint8)
    twice = quotient.bfloat16().to(torch.float8_e4m3fn).view(torch.uint8)
    assert_same_bits(once, ours.view(torch.uint8))
    assert_same_bits(twice, theirs)


@pytest.mark.slow
def test_modelopt_still_exports_the_golden_tensors() -> None:
    from golden.regenerate import exported

    for name in NAMES:
        for key, value in exported(GOLDEN[f"{name}.weight"]).items():
            assert_same_bits(GOLDEN[f"{name}.{key}"], value)
