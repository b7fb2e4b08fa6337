"""The backends that can be compared here, and tensors that reach every corner of the formats."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import autoquant_kernels as ak
import pytest
import torch
from autoquant_kernels import backends, cpu
from torch import Tensor

RULES = ("max", "mse", "four_over_six", "diagonal", "hessian")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fused_backends() -> list[object]:
    """Every backend but the reference, those that cannot run here with the reason."""
    compiled = cpu.library()
    best = -1 if compiled is None else cpu.best_level(compiled)
    found: list[object] = []
    for level, name in enumerate(cpu.LEVELS):
        reason = "no C++ compiler" if best < 0 else f"the processor lacks {name}"
        found.append(pytest.param(name, marks=pytest.mark.skipif(level > best, reason=reason)))
    missing = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
    return [*found, pytest.param("triton", marks=missing)]


@contextmanager
def forced(name: str) -> Iterator[str]:
    """`AUTOQUANT_KERNELS=name` for a while; gives the device that the backend works on."""
    before = os.environ.get(backends.VARIABLE)
    os.environ[backends.VARIABLE] = name
    try:
        yield "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    finally:
        if before is None:
            del os.environ[backends.VARIABLE]
        else:
            os.environ[backends.VARIABLE] = before


def assert_same_bits(expected: Tensor, got: Tensor) -> None:
    """Equal bit for bit, where a NaN equals every NaN."""
    got = got.cpu()
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    both_nan = expected.float().isnan() & got.float().isnan()
    wrong = (expected.view(width) != got.view(width)) & ~both_nan
    where = wrong.nonzero()[:3].tolist()
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} differ, first at {where}"


def every_bfloat16() -> Tensor:
    """`[65536, 16]`: each bfloat16 bit pattern once, in one position of an ordinary block."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(65536, 16, generator=generator).bfloat16()
    x[:, 5] = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return x


def tie_grid(global_scale: float) -> Tensor:
    """`[n, 16]` float32: exact ties of E2M1 and one ulp beside them, under every block scale."""
    scales = torch.arange(1, 127).to(torch.uint8).view(torch.float8_e4m3fn).float() * global_scale
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    exact = scales[:, None] * middles
    up, down = (torch.nextafter(exact, torch.tensor(end)) for end in (torch.inf, 0.0))
    x = torch.cat((exact, -exact, up, -up, down, -down), dim=1)
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 15)).view(-1, 15)
    largest = (scales * 6).repeat_interleave(x.shape[0] // scales.shape[0])[:, None]
    return torch.cat((largest, x), dim=1)


def edge_blocks() -> Tensor:
    """`[12, 16]` float32: zeros of both signs, subnormals, saturation, NaN and Inf."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(12, 16, generator=generator)
    x[0], x[1] = 0.0, -0.0
    x[2] *= 1e-40
    x[3] *= 1e-30
    x[4] *= 1e30
    x[5, 3], x[6, 0] = torch.nan, -torch.nan
    x[7, 3], x[8, 15] = torch.inf, -torch.inf
    x[9, 2], x[9, 9] = torch.inf, torch.nan
    x[10, ::2] = -0.0
    x[11] = torch.nan
    return x


def five_distributions(rows: int, columns: int) -> dict[str, Tensor]:
    """float32 `[rows, columns]` by name: normal, uniform, Laplace, Student-t and log-normal."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(rows, columns, generator=generator)
    uniform = torch.rand(rows, columns, generator=generator) * 2 - 1
    sign = torch.where(torch.rand(rows, columns, generator=generator) < 0.5, -1.0, 1.0)
    exponential = torch.rand(rows, columns, generator=generator).clamp_(min=1e-7).log_().neg_()
    squares = sum(torch.randn(rows, columns, generator=generator).square_() for _ in range(3))
    return {
        "normal": normal,
        "uniform": uniform,
        "laplace": sign * exponential,
        "student_t": normal / (squares / 3).sqrt_(),
        "log_normal": sign * torch.randn(rows, columns, generator=generator).exp_(),
    }


def moments_of(rule: str, columns: int) -> Tensor | None:
    """Second moments of 16 random inputs for a rule that weighs by them, else None."""
    if rule not in {"diagonal", "hessian"}:
        return None
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(columns // 16, 16, 16, generator=generator)
    moments = inputs.mT @ inputs
    return moments if rule == "hessian" else moments.diagonal(dim1=1, dim2=2).contiguous()


def upper_factor(columns: int) -> Tensor:
    """The upper Cholesky factor of the inverse of second moments, float32 `[columns, columns]`."""
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(2 * columns, columns, generator=generator) @ (mixing + torch.eye(columns))
    moments = (inputs.mT @ inputs / len(inputs)).double() + 0.05 * torch.eye(columns)
    return torch.linalg.cholesky(torch.linalg.inv(moments), upper=True).float()


def compensated(x: Tensor, amax: float | Tensor, rule: str, most: int = 48) -> tuple[Tensor, ...]:
    """Codes, scales and errors of the first columns of `x` `[..., N, K]`, errors carried along."""
    w = x[..., :most].float()
    upper = upper_factor(w.shape[-1]).to(x.device).expand(*w.shape[:-2], -1, -1)
    return ak.compensate_nvfp4(w, upper, ak.nvfp4_global_scale(amax, rule), rule=rule)


def compensated_fp8(x: Tensor, amax: float | Tensor, most: int = 48) -> tuple[Tensor, Tensor]:
    """The same to E4M3 codes."""
    w = x[..., :most].float()
    upper = upper_factor(w.shape[-1]).to(x.device).expand(*w.shape[:-2], -1, -1)
    return ak.compensate_fp8(w, upper, ak.fp8_scale(amax))


def all_outputs(x: Tensor, amax: float | Tensor) -> dict[str, Tensor]:
    """Every operation on `x` `[..., N, K]` under the backend in force, by name."""
    scale = ak.fp8_scale(amax)
    g = ak.nvfp4_global_scale(amax)
    found = {
        "dynamic": ak.fake_quant_nvfp4(x, g),
        "fp8": ak.fake_quant_fp8(x, scale),
        "fp8 codes": ak.quantize_fp8(x, scale),
    }
    found["fp8 numbers"] = ak.dequantize_fp8(found["fp8 codes"], scale, dtype=x.dtype)
    for rule in RULES:
        g = ak.nvfp4_global_scale(amax, rule)
        moments = moments_of(rule, x.shape[-1])
        moments = moments if moments is None else moments.to(x.device)
        codes, scales = ak.quantize_nvfp4(x, g, rule=rule, moments=moments)
        found[f"{rule} weight"] = ak.fake_quant_nvfp4_weight(x, g, rule=rule, moments=moments)
        found[f"{rule} codes"], found[f"{rule} scales"] = codes, scales
        found[f"{rule} numbers"] = ak.dequantize_nvfp4(codes, scales, g, dtype=x.dtype)
    parts = compensated(x, amax, "hessian", 32)  # other rules and columns: test_compensation.py
    for name, part in zip(("codes", "scales", "errors"), parts, strict=True):
        found[f"compensated {name}"] = part
    found["compensated fp8 codes"], found["compensated fp8 errors"] = compensated_fp8(x, amax)
    return found
