"""Times every GPU operation with a cold cache, after checking its bits against the reference.

    python kernels/bench/gpu.py --out kernels/bench/results/gpu.csv
    python kernels/bench/gpu.py --tune quantize_nvfp4 "weight max"

The peer is ModelOpt's own Triton kernel, launched as its wrapper launches it. Event pairs enclose
the kernel alone: a buffer several times the size of the cache is overwritten before each, which
also gives Python the time to have the launch queued.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import autoquant_kernels as ak
import torch
import triton
from autoquant_kernels import reference
from autoquant_kernels.gpu import backend as triton_backend
from rows import Row, assert_equal, median, row, write
from torch import Tensor

SHAPES = ((4096, 4096), (8192, 28672), (32768, 4096))
REPEATS = 100
FLUSH_BYTES = 1 << 30
MATRICES = 128
LAZY = 128
"""Columns that one launch of compensated rounding takes."""
COMPENSATED_BYTES = 8 + (8 + 1) / 16
"""An element: float32 weights and errors; a block: codes, and a scale."""
HEAD = (32768, 4096, 131072)
SCALE_RULES = ("mse", "four_over_six")
WEIGHTED_RULES = ("diagonal", "hessian")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="CSV file for the rows")
    parser.add_argument("--tune", nargs="+", help="operations whose block sizes to time instead")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.tune:
        tune(arguments.tune)
        return
    check_bits()
    check_parity_with_modelopt()
    rows = [r for shape in SHAPES for r in time_shape(shape)] + time_head()
    for r in rows:
        print(
            f"{r.op:24} {r.backend:10} {r.shape:18} {r.p20_us:10.1f} {r.p50_us:10.1f} "
            f"{r.p80_us:10.1f} us {r.gigabytes_per_s:8.0f} GB/s  x{r.ratio_to_copy}"
        )
    if arguments.out:
        write(rows, arguments.out)


def check_bits() -> None:
    """Raise unless the GPU returns the reference's bits, computed on the CPU."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(1024, 4096).mul_(torch.randn(1024, 1).mul_(2).exp_()).to(dtype)
        g = float(ak.nvfp4_global_scale(x.float().abs().max()))
        expected = torch.empty_like(x)
        reference.fake_quant_nvfp4(x, [g], expected)
        assert_equal(expected, ak.fake_quant_nvfp4(x.cuda(), g))
        reference.fake_quant_fp8(x, [g], expected)
        assert_equal(expected, ak.fake_quant_fp8(x.cuda(), g))
        weighs = moments(x.shape[1])
        for rule in ("max", *SCALE_RULES, *WEIGHTED_RULES):
            m = weighs.get(rule)
            reference.fake_quant_nvfp4_weight(
                x, [g], rule, None if m is None else m[None], expected
            )
            m = None if m is None else m.cuda()
            assert_equal(expected, ak.fake_quant_nvfp4_weight(x.cuda(), g, rule=rule, moments=m))
            codes, scales = ak.quantize_nvfp4(x.cuda(), g, rule=rule, moments=m)
            assert_equal(expected, ak.dequantize_nvfp4(codes, scales, g, dtype=dtype))
    check_compensated_bits()
    print("bits equal the reference's")


def check_compensated_bits() -> None:
    """Raise unless compensated rounding of three matrices returns the reference's bits."""
    sizes = torch.randn(3, 500, 1).mul_(2).exp_()
    w, upper = torch.randn(3, 500, LAZY).mul_(sizes), factor().expand(3, -1, -1).contiguous()
    amax = w.abs().amax(dim=(1, 2))
    rows, errors = w.view(-1, LAZY), torch.empty_like(w.view(-1, LAZY))
    codes = torch.empty(len(rows), LAZY // 2, dtype=torch.uint8)
    stored = torch.empty(len(rows), LAZY // 16, dtype=torch.float8_e4m3fn)
    for rule in ("max", *SCALE_RULES, *WEIGHTED_RULES):
        g = ak.nvfp4_global_scale(amax, rule)
        reference.compensate_nvfp4(rows, upper, g.tolist(), rule, codes, stored, errors)
        found = ak.compensate_nvfp4(w.cuda(), upper.cuda(), g, rule=rule)
        for expected, got in zip((codes, stored, errors), found, strict=True):
            assert_equal(expected.view(torch.int32), got.view(-1, got.shape[-1]).view(torch.int32))
    scale, codes = ak.fp8_scale(amax), torch.empty(rows.shape, dtype=torch.float8_e4m3fn)
    reference.compensate_fp8(rows, upper, scale.tolist(), codes, errors)
    found = ak.compensate_fp8(w.cuda(), upper.cuda(), scale)
    for expected, got in zip((codes, errors), found, strict=True):
        assert_equal(expected.view(torch.int32), got.view(-1, LAZY).view(torch.int32))


def factor() -> Tensor:
    """The upper factor of inputs that depend on each other, float32 `[LAZY, LAZY]`."""
    inputs = torch.randn(4 * LAZY, LAZY) @ (torch.randn(LAZY, LAZY) / LAZY**0.5 + torch.eye(LAZY))
    inverse = torch.linalg.inv((inputs.mT @ inputs / len(inputs)).double())
    return torch.linalg.cholesky(inverse, upper=True).float()


def moments(columns: int) -> dict[str, Tensor]:
    """Of blocks of inputs that depend on each other, by the rule that weighs by them."""
    inputs = torch.randn(256, columns // 16, 16) @ torch.randn(16, 16)
    blocks = torch.einsum("tbi,tbj->bij", inputs, inputs) / len(inputs)
    return {"hessian": blocks, "diagonal": blocks.diagonal(dim1=1, dim2=2).contiguous()}


def modelopt_kernel(x: Tensor, g: Tensor, out: Tensor) -> None:
    """ModelOpt's dynamic NVFP4 kernel with the tile sizes of its wrapper."""
    from modelopt.torch.kernels.quantization.gemm import fp4_kernel_hopper as peer

    rows, columns = x.shape
    grid = (triton.cdiv(rows, 16), triton.cdiv(columns, 64))
    peer.fp4_fake_quant_kernel[grid](
        x,
        out,
        rows,
        columns,
        g,
        *x.stride(),
        *out.stride(),
        16,
        16,
        64,
        4,
        triton.language.bfloat16,
    )


def check_parity_with_modelopt() -> None:
    """Raise if a result differs where ModelOpt's approximate division cannot be the reason."""
    x = torch.randn(4096, 4096, device="cuda").mul_(0.02).bfloat16()
    g = ak.nvfp4_global_scale(x.abs().max())
    ours, theirs = ak.fake_quant_nvfp4(x, g), torch.empty_like(x)
    modelopt_kernel(x, g.cuda(), theirs)
    blocks = x.double().view(-1, 16)
    t = blocks.abs().amax(-1, keepdim=True) / (6 * float(g))
    s = (t.float().clamp(max=448).to(torch.float8_e4m3fn).double() * float(g)).float().double()
    at_tie = near_midpoint(t, 2.0 ** (t.log2().floor() - 3)) | near_midpoint(
        blocks / s,
        torch.where((blocks / s).abs() < 2, 0.5, torch.where(blocks.abs() / s < 4, 1, 2)),
    )
    differs = (ours != theirs).view(-1, 16)
    unexplained = (differs & ~at_tie).sum().item()
    print(
        f"modelopt: {differs.sum().item()} of {x.numel()} differ, {unexplained} not at a midpoint"
    )
    assert unexplained == 0


def near_midpoint(value: Tensor, step: Tensor) -> Tensor:
    """Whether `value` is within 4 float32 ulp of an odd multiple of step / 2."""
    halves = value.abs() / step - 0.5
    return (halves - halves.round()).abs() * step <= 4 * 2.0**-23 * value.abs()


def cold(work: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Microseconds of `work` on the GPU, each time after the cache was overwritten."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    for _ in range(5):
        work()
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        pairs.append((start, stop))
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(stop) for start, stop in pairs]


def operations(shape: tuple[int, int]) -> dict[str, tuple[str, float, Callable[[], object]]]:
    """Per operation: the implementation, its bytes per element, the work."""
    x = torch.randn(shape, device="cuda").mul_(0.02).bfloat16()
    out = torch.empty_like(x)
    amax = x.abs().max()
    g, g256 = (float(ak.nvfp4_global_scale(amax, rule)) for rule in ("max", "four_over_six"))
    scale = float(ak.fp8_scale(amax))
    codes, scales = ak.quantize_nvfp4(x, g)
    fp8 = ak.quantize_fp8(x, scale)
    device_g = torch.tensor(g, device="cuda")
    weight = ak.fake_quant_nvfp4_weight
    weighted = triton_backend.fake_quant_nvfp4_weight  # moments are not searched for NaN each time
    each = ak.nvfp4_global_scale(x.abs().view(MATRICES, -1).amax(dim=1))
    weighs = {rule: own.cuda()[None] for rule, own in moments(shape[1]).items()}
    rows, carries = x.view(-1, LAZY).float(), factor().cuda()
    return {
        "copy": ("torch", 4, lambda: out.copy_(x)),
        "fake_quant_nvfp4": ("triton", 4, lambda: ak.fake_quant_nvfp4(x, g, out=out)),
        "fake_quant_nvfp4 modelopt": ("modelopt", 4, lambda: modelopt_kernel(x, device_g, out)),
        "fake_quant_fp8": ("triton", 4, lambda: ak.fake_quant_fp8(x, scale, out=out)),
        "quantize_nvfp4": ("triton", 2.5625, lambda: ak.quantize_nvfp4(x, g)),
        "dequantize_nvfp4": (
            "triton",
            2.5625,
            lambda: ak.dequantize_nvfp4(codes, scales, g, out=out),
        ),
        "quantize_fp8": ("triton", 3, lambda: ak.quantize_fp8(x, scale)),
        "dequantize_fp8": ("triton", 3, lambda: ak.dequantize_fp8(fp8, scale, out=out)),
        "weight max": ("triton", 4, lambda: weight(x, g, out=out)),
        "weight max, 128 scales": (
            "triton",
            4,
            lambda: weight(
                x.view(MATRICES, -1, shape[1]), each, out=out.view(MATRICES, -1, shape[1])
            ),
        ),
        "weight four_over_six": (
            "triton",
            4,
            lambda: weight(x, g256, rule="four_over_six", out=out),
        ),
        "weight mse": ("triton", 4, lambda: weight(x, g, rule="mse", out=out)),
        "weight diagonal": (
            "triton",
            4,
            lambda: weighted(x, [g], "diagonal", weighs["diagonal"], out),
        ),
        "weight hessian": (
            "triton",
            4,
            lambda: weighted(x, [g], "hessian", weighs["hessian"], out),
        ),
        "compensate max": (
            "triton",
            COMPENSATED_BYTES,
            lambda: ak.compensate_nvfp4(rows, carries, g, rule="max"),
        ),
        "compensate mse": (
            "triton",
            COMPENSATED_BYTES,
            lambda: ak.compensate_nvfp4(rows, carries, g, rule="mse"),
        ),
        "compensate hessian": (
            "triton",
            COMPENSATED_BYTES,
            lambda: ak.compensate_nvfp4(rows, carries, g, rule="hessian"),
        ),
        "compensate fp8": ("triton", 9, lambda: ak.compensate_fp8(rows, carries, scale)),
    }


def time_shape(shape: tuple[int, int]) -> list[Row]:
    """Rows of all element-wise operations on one shape."""
    rows, copy_us = [], 0.0
    elements = shape[0] * shape[1]
    for op, (backend, bytes_per_element, work) in operations(shape).items():
        times = cold(work)
        copy_us = copy_us or median(times)
        size = int(elements * bytes_per_element)
        rows.append(row(op, backend, shape, times, bytes=size, copy_us=copy_us))
    return rows


def time_head() -> list[Row]:
    """Rows of the fused head and KL, and of the same matrix products alone."""
    tokens, width, vocabulary = HEAD
    hidden_p = torch.randn(tokens, width, device="cuda").bfloat16()
    hidden_q = (
        hidden_p.float() + 0.01 * torch.randn_like(hidden_p, dtype=torch.float32)
    ).bfloat16()
    weight = torch.randn(vocabulary, width, device="cuda").mul_(width**-0.5).bfloat16()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ak.head_token_kl(hidden_p, hidden_q, weight)
    peak = torch.cuda.max_memory_allocated() - before
    print(f"head_token_kl: {peak / 1e6:.0f} MB beyond its arguments")
    fused = cold(lambda: ak.head_token_kl(hidden_p, hidden_q, weight), repeats=7)
    chunk = 1024
    tile = torch.empty(chunk, vocabulary, device="cuda", dtype=torch.bfloat16)

    def products() -> None:
        for start in range(0, tokens, chunk):
            torch.mm(hidden_p[start : start + chunk], weight.T, out=tile)
            torch.mm(hidden_q[start : start + chunk], weight.T, out=tile)

    alone = cold(products, repeats=7)
    size = 2 * (2 * tokens * width + vocabulary * width)
    base = median(alone)
    return [
        row("head matrix products", "cublas", HEAD, alone, bytes=size, copy_us=base),
        row("head_token_kl", "triton", HEAD, fused, bytes=size, copy_us=base),
    ]


def tune(names: Sequence[str]) -> None:
    """Print the median times of block sizes and warp counts, the fastest first."""
    work = operations((8192, 28672))
    print("copy", round(median(cold(work["copy"][2], 30)), 1))
    for op in names:
        sizes = (1024, 2048, 4096, 8192) if "fp8" in op else (64, 128, 256, 512)
        found = []
        for size, warps in itertools.product(sizes, (1, 2, 4, 8)):
            triton_backend.BLOCKS = triton_backend.WIDE_BLOCKS = size
            triton_backend.WORDS = triton_backend.ELEMENTS = size
            triton_backend.OPTIONS["num_warps"] = warps
            triton_backend.PACK_OPTIONS["num_warps"] = warps
            found.append((round(median(cold(work[op][2], 20)), 1), size, warps))
        print(op, sorted(found)[:6], "worst", max(found), flush=True)


if __name__ == "__main__":
    main()
