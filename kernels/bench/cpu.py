"""Times every CPU operation beside its peers, after checking its bits against the reference.

    python kernels/bench/cpu.py --threads 2 --out kernels/bench/results/cpu.csv

All implementations take turns within one run, so that a busy moment of the machine meets all of
them. A peer that is not installed is left out by name.
"""

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path

import autoquant_kernels as ak
import torch
from autoquant_kernels import reference
from rows import assert_equal, median, row, write
from torch import Tensor

SHAPE = (4096, 4096)
LAZY = 128
"""Columns that one call of compensated rounding takes."""
ROUNDS = 21
SLOW_ROUNDS = 3
Timed = tuple[str, str, float, Callable[[], object]]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="CSV file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    x = torch.randn(SHAPE).mul_(0.02).bfloat16()
    check_bits(x[:256].contiguous())
    timed = ours(x)
    times = interleaved(timed, arguments.rounds)
    slow = compensations(x) + peers(x)
    times += interleaved(slow, SLOW_ROUNDS)
    copy_us = median(times[0])
    rows = [
        row(op, backend, SHAPE, found, bytes=int(x.numel() * size), copy_us=copy_us)
        for (op, backend, size, _), found in zip(timed + slow, times, strict=True)
    ]
    for r in rows:
        print(
            f"{r.op:22} {r.backend:22} {r.p20_us:10.0f} {r.p50_us:10.0f} {r.p80_us:10.0f} us "
            f"{r.gigabytes_per_s:7.1f} GB/s  x{r.ratio_to_copy}"
        )
    if arguments.out:
        write(rows, arguments.out)


def check_bits(x: Tensor) -> None:
    """Raise unless the backend in force returns the reference's bits."""
    g = float(ak.nvfp4_global_scale(x.abs().max()))
    expected = torch.empty_like(x)
    reference.fake_quant_nvfp4(x, [g], expected)
    assert_equal(expected, ak.fake_quant_nvfp4(x, g))
    reference.fake_quant_fp8(x, [g], expected)
    assert_equal(expected, ak.fake_quant_fp8(x, g))
    for rule in ("max", "mse", "four_over_six"):
        reference.fake_quant_nvfp4_weight(x, [g], rule, None, expected)
        assert_equal(expected, ak.fake_quant_nvfp4_weight(x, g, rule=rule))
        codes, scales = ak.quantize_nvfp4(x, g, rule=rule)
        assert_equal(expected, ak.dequantize_nvfp4(codes, scales, g))


def ours(x: Tensor) -> list[Timed]:
    """Operation, backend, bytes per element and work; the copy comes first."""
    out, name = torch.empty_like(x), ak.active_backend()
    amax = x.abs().max()
    g, g256 = (float(ak.nvfp4_global_scale(amax, rule)) for rule in ("max", "four_over_six"))
    scale = float(ak.fp8_scale(amax))
    codes, scales = ak.quantize_nvfp4(x, g)
    fp8 = ak.quantize_fp8(x, scale)
    weight = ak.fake_quant_nvfp4_weight
    return [
        ("copy", "torch", 4, lambda: out.copy_(x)),
        ("fake_quant_nvfp4", name, 4, lambda: ak.fake_quant_nvfp4(x, g, out=out)),
        ("fake_quant_fp8", name, 4, lambda: ak.fake_quant_fp8(x, scale, out=out)),
        ("quantize_nvfp4", name, 2.5625, lambda: ak.quantize_nvfp4(x, g)),
        ("dequantize_nvfp4", name, 2.5625, lambda: ak.dequantize_nvfp4(codes, scales, g, out=out)),
        ("dequantize_fp8", name, 3, lambda: ak.dequantize_fp8(fp8, scale, out=out)),
        ("weight max", name, 4, lambda: weight(x, g, out=out)),
        ("weight four_over_six", name, 4, lambda: weight(x, g256, rule="four_over_six", out=out)),
        ("weight mse", name, 4, lambda: weight(x, g, rule="mse", out=out)),
    ]


def compensations(x: Tensor) -> list[Timed]:
    """Compensated rounding of the same elements as rows of `LAZY` columns."""
    rows, name, amax = x.view(-1, LAZY).float(), ak.active_backend(), x.abs().max()
    g, scale = ak.nvfp4_global_scale(amax), ak.fp8_scale(amax)
    inputs = torch.randn(4 * LAZY, LAZY) @ (torch.randn(LAZY, LAZY) / LAZY**0.5 + torch.eye(LAZY))
    inverse = torch.linalg.inv((inputs.mT @ inputs / len(inputs)).double())
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    check_compensated_bits(rows[:256], upper, float(g))
    size = 8 + (8 + 1) / 16  # float32 weights and errors, and codes and a scale of every block

    def nvfp4(rule: str) -> Callable[[], object]:
        return lambda: ak.compensate_nvfp4(rows, upper, g, rule=rule)

    return [
        *((f"compensate {rule}", name, size, nvfp4(rule)) for rule in ("max", "mse", "hessian")),
        ("compensate fp8", name, 9, lambda: ak.compensate_fp8(rows, upper, scale)),
    ]


def check_compensated_bits(w: Tensor, upper: Tensor, g: float) -> None:
    """Raise unless compensated rounding returns the reference's bits."""
    codes = torch.empty(len(w), LAZY // 2, dtype=torch.uint8)
    scales = torch.empty(len(w), LAZY // 16, dtype=torch.float8_e4m3fn)
    errors = torch.empty_like(w)
    reference.compensate_nvfp4(w, upper[None], [g], "hessian", codes, scales, errors)
    found = ak.compensate_nvfp4(w, upper, g, rule="hessian")
    for expected, got in zip((codes, scales, errors), found, strict=True):
        assert_equal(expected.view(torch.int32), got.view(torch.int32))


def peers(x: Tensor) -> list[Timed]:
    """The same for other people's NVFP4 fake quantization, quantize and dequantize where split."""
    g = float(ak.nvfp4_global_scale(x.abs().max()))
    out = torch.empty_like(x)
    found: list[Timed] = [
        ("fake_quant_nvfp4", "reference", 4, lambda: reference.fake_quant_nvfp4(x, [g], out))
    ]
    for build in (modelopt, compressed_tensors, torchao, inductor):
        try:
            found.append(("fake_quant_nvfp4", build.__name__, 4, build(x, g)))
        except ImportError as error:
            print(f"{build.__name__} is left out: {error}")
    return found


def modelopt(x: Tensor, g: float) -> Callable[[], object]:
    """ModelOpt's packing and its way back; its fake quantization does not run on a CPU."""
    qtensor = importlib.import_module("modelopt.torch.quantization.qtensor")

    def work() -> Tensor:
        packed, scales, scale = qtensor.NVFP4QTensor.quantize(x, 16)
        blocks = {-1: 16}
        return packed.dequantize(x.dtype, scale=scales, double_scale=scale, block_sizes=blocks)

    return work


def compressed_tensors(x: Tensor, g: float) -> Callable[[], object]:
    """The fake quantization of compressed-tensors with its own block scales."""
    module = importlib.import_module("compressed_tensors.quantization")
    forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    utils = importlib.import_module("compressed_tensors.quantization.utils")
    arguments = module.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
    )
    blocks = x.view(x.shape[0], -1, 16)
    low, high = blocks.amin(-1), blocks.amax(-1)
    global_scale = utils.generate_gparam(x.amin().view(1), x.amax().view(1))
    scale, zero = utils.calculate_qparams(low, high, arguments, global_scale=global_scale)
    return lambda: forward.fake_quantize(x, scale, zero, arguments, global_scale=global_scale)


def torchao(x: Tensor, g: float) -> Callable[[], object]:
    """The NVFP4 tensor of torchao, there and back."""
    module = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")
    scale = torch.tensor(g)
    return lambda: module.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(x.dtype)


def inductor(x: Tensor, g: float) -> Callable[[], object]:
    """Our reference's arithmetic, fused by torch.compile."""

    @torch.compile
    def fused(x: Tensor, g: Tensor) -> Tensor:
        blocks = x.view(-1, 16).float()
        amax = blocks.abs().amax(-1, keepdim=True)
        scale = reference.round_e4m3(amax / (g * 6)) * g
        y = reference.round_e2m1(blocks / torch.where(scale == 0, 1.0, scale)) * scale
        return torch.copysign(y, blocks).to(x.dtype).view(x.shape)

    scale = torch.tensor(g)
    return lambda: fused(x, scale)


def interleaved(timed: list[Timed], rounds: int) -> list[list[float]]:
    """Microseconds per implementation; each runs once per round, after one round to warm up."""
    times: list[list[float]] = [[] for _ in timed]
    for index in range(rounds + 1):
        for found, (*_, work) in zip(times, timed, strict=True):
            start = time.perf_counter()
            work()
            if index:
                found.append(1e6 * (time.perf_counter() - start))
    return times


if __name__ == "__main__":
    main()
