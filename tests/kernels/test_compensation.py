"""Columns rounded one after the other: the bits of a plain loop everywhere, and what it gains."""

import autoquant_kernels as ak
import numpy as np
import pytest
import torch
from kernel_cases import (
    RULES,
    assert_same_bits,
    compensated,
    compensated_fp8,
    edge_blocks,
    five_distributions,
    forced,
    fused_backends,
    upper_factor,
)
from torch import Tensor

BACKENDS = ["reference", *fused_backends()]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E4M3 = np.arange(127, dtype=np.uint8)
COLUMNS = [16, 48, pytest.param(128, marks=pytest.mark.slow)]


def nearest(quotient: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The codes of the nearest numbers to float32 magnitudes; halfway the even one."""
    wide = grid.astype(np.float64)
    middles = (wide[1:] + wide[:-1]) / 2  # exact
    code = np.searchsorted(middles, quotient)
    is_halfway = quotient == middles[np.minimum(code, len(middles) - 1)]
    return code + (is_halfway & (code % 2 == 1))


def e4m3(code: np.ndarray) -> np.ndarray:
    return torch.from_numpy(code.astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy()


def carried(
    rest: np.ndarray, upper: np.ndarray, first: int, scale: np.ndarray, grid: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """16 columns in float32: their codes, errors, and all columns with these subtracted."""
    rest, codes, errors = rest.copy(), [], []
    for j in range(first, first + 16):
        v = rest[:, j]
        code = nearest(np.abs(v) / scale, grid)
        y = np.copysign(grid[code] * scale, v)
        error = (v - y) * (np.float32(1) / upper[j, j])
        for column in range(j + 1, rest.shape[1]):
            rest[:, column] = rest[:, column] - error * upper[j, column]
        codes.append(code)
        errors.append(error)
    return np.stack(codes, 1), np.stack(errors, 1), rest


def block_scale(
    rest: np.ndarray, upper: np.ndarray, first: int, g: np.float32, rule: str
) -> np.ndarray:
    """The E4M3 code of each row's block, from what is left of it."""
    own = slice(first, first + 16)
    block = torch.from_numpy(rest[:, own].copy())
    weights = None
    if rule == "diagonal":
        squares = np.square(np.diagonal(upper)[own])
        weights = torch.from_numpy(np.float32(1) / squares)[None]
    plain = "max" if rule == "hessian" else rule
    _, scales = ak.quantize_nvfp4(block, float(g), rule=plain, moments=weights)
    best = scales.view(torch.uint8)[:, 0].numpy().astype(int)
    if rule != "hessian":
        return best
    start, least = best, None
    for offset in (0, *range(-3, 9)):
        tried = np.clip(start + offset, 1, 126)
        _, errors, _ = carried(rest[:, own], upper[own, own], 0, e4m3(tried) * g, E2M1)
        total = errors[:, 0] * errors[:, 0]
        for column in range(1, 16):
            total = total + errors[:, column] * errors[:, column]
        if least is None:
            least = total
        best, least = np.where(total < least, tried, best), np.minimum(total, least)
    return best


def textbook(w: Tensor, upper: Tensor, g: Tensor, rule: str) -> tuple[Tensor, ...]:
    """What `compensate_nvfp4` returns of finite `[N, C]` without zeros, in plain float32."""
    rest, factor, scale = w.numpy().copy(), upper.numpy(), g.numpy()
    codes, scales, errors = [], [], []
    for first in range(0, rest.shape[1], 16):
        own = block_scale(rest, factor, first, scale, rule)
        before = rest
        code, error, rest = carried(rest, factor, first, e4m3(own) * scale, E2M1)
        final = rest[:, first : first + 16]  # a column no longer changes once it is rounded
        assert np.array_equal(final[:, 0], before[:, first])
        codes.append(code + 8 * (final < 0))
        scales.append(own)
        errors.append(error)
    nibbles = np.concatenate(codes, 1).astype(np.uint8)
    packed = torch.from_numpy(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4))
    stored = torch.from_numpy(np.stack(scales, 1).astype(np.uint8)).view(torch.float8_e4m3fn)
    return packed, stored, torch.from_numpy(np.concatenate(errors, 1))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rule", RULES)
def test_nvfp4_is_a_plain_loop_over_columns(rule: str, columns: int) -> None:
    w, upper = five_distributions(20, columns)["student_t"], upper_factor(columns)
    g = ak.nvfp4_global_scale(w.abs().max(), rule)
    expected = textbook(w, upper, g, rule)
    for backend in ("reference", "auto"):
        with forced(backend):
            found = ak.compensate_nvfp4(w, upper, g, rule=rule)
        for ours, theirs in zip(expected, found, strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize("columns", COLUMNS)
def test_fp8_is_a_plain_loop_over_columns(columns: int) -> None:
    w, upper = five_distributions(20, columns)["normal"], upper_factor(columns)
    scale = ak.fp8_scale(w.abs().max() / 2)  # what is beyond half of the largest saturates
    rest, codes, errors = w.numpy().copy(), [], []
    for first in range(0, columns, 16):
        code, error, rest = carried(rest, upper.numpy(), first, scale.numpy(), e4m3(E4M3))
        codes.append(code + 128 * (rest[:, first : first + 16] < 0))
        errors.append(error)
    expected = torch.from_numpy(np.concatenate(codes, 1).astype(np.uint8))
    assert (expected & 0x7F == 0x7E).any()
    for backend in ("reference", "auto"):
        with forced(backend):
            found, left = ak.compensate_fp8(w, upper, scale)
        assert torch.equal(found.view(torch.uint8), expected)
        assert torch.equal(left, torch.from_numpy(np.concatenate(errors, 1)))


def edge_rows() -> Tensor:
    """`[2, 14, 32]`: every edge block before another one, then behind it; rows of zeros."""
    usual = five_distributions(14, 32)["normal"]
    rows = torch.stack((usual, usual.flip(0)))
    rows[0, :12, :16] = edge_blocks()
    rows[1, :12, 16:32] = edge_blocks()
    rows[:, 12] = 0.0
    rows[:, 13, 16:] = 0.0
    return rows


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize("rule", [*RULES, None])
def test_edges_have_the_same_bits_wherever_they_stand(backend: str, rule: str | None) -> None:
    w, amax, found = edge_rows(), torch.tensor([3.0, 0.01]), []
    for name in ("reference", backend):
        with forced(name) as device:
            own = w.to(device)
            found.append(compensated(own, amax, rule) if rule else compensated_fp8(own, amax))
    for expected, got in zip(*found, strict=True):
        assert_same_bits(expected, got)


@pytest.mark.parametrize("backend", fused_backends())
@pytest.mark.parametrize(
    ("columns", "rule"),
    [
        (16, "hessian"),
        (48, "diagonal"),
        pytest.param(128, "max", marks=pytest.mark.slow),
        pytest.param(272, "mse", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_columns(backend: str, columns: int, rule: str) -> None:
    x = five_distributions(33, columns)["laplace"]
    outputs = []
    for name in ("reference", backend):
        with forced(name) as device:
            own = x.to(device)
            outputs.append(
                compensated(own, 9.0, rule, columns) + compensated_fp8(own, 9.0, columns)
            )
    for expected, got in zip(*outputs, strict=True):
        assert_same_bits(expected, got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_row_and_behind_it(backend: str) -> None:
    w = five_distributions(4, 48)["normal"]
    clean = compensated(w, 4.0, "max")[1].float(), compensated_fp8(w, 4.0)[0].float()
    w[1, 20] = torch.nan
    with forced(backend) as device:
        scales = compensated(w.to(device), 4.0, "max")[1].float().cpu()
        codes = compensated_fp8(w.to(device), 4.0)[0].float().cpu()
    assert scales.isnan().nonzero().tolist() == [[1, 1], [1, 2]]
    assert codes.isnan().nonzero().tolist() == [[1, column] for column in range(20, 48)]
    others = torch.tensor([0, 2, 3])
    assert torch.equal(scales[others], clean[0][others])
    assert torch.equal(codes[others], clean[1][others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_row_of_zeros_has_scales_of_one(backend: str, rule: str) -> None:
    with forced(backend) as device:
        codes, scales, errors = (
            part.cpu() for part in compensated(torch.zeros(1, 32, device=device), 1.0, rule)
        )
    assert scales.float().tolist() == [[1.0, 1.0]]
    assert not codes.any()
    assert not errors.any()


@pytest.mark.parametrize("rule", ["max", "mse", "four_over_six"])
def test_without_moments_between_columns_nothing_is_carried(rule: str) -> None:
    w = five_distributions(256, 64)["normal"]
    g = ak.nvfp4_global_scale(w.abs().max(), rule)
    expected, start = ak.quantize_nvfp4(w, g, rule=rule)
    codes, scales, errors = ak.compensate_nvfp4(w, torch.eye(64), g, rule=rule)
    assert torch.equal(codes, expected)
    assert_same_bits(start, scales)
    assert torch.equal(errors, w - ak.dequantize_nvfp4(expected, start, g, dtype=torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_without_moments_between_columns_has_the_codes_of_each_alone(backend: str) -> None:
    """But for signs of zeros, which differences do not keep."""
    w = torch.cat((edge_blocks(), five_distributions(256, 16)["student_t"]))
    w, scale = w[(w.abs() < 1e18).all(dim=1)], ak.fp8_scale(3.0)
    expected = ak.quantize_fp8(w, scale)
    with forced(backend) as device:
        codes, errors = (
            found.cpu()
            for found in ak.compensate_fp8(w.to(device), torch.eye(16, device=device), scale)
        )
    assert_same_bits(expected.view(torch.uint8)[w != 0], codes.view(torch.uint8)[w != 0])
    assert torch.equal(codes.float(), expected.float())
    assert torch.equal(errors, w - ak.dequantize_fp8(expected, scale, dtype=torch.float32))


@pytest.mark.parametrize("columns", [16, 64])
def test_carrying_errors_lowers_what_they_do_to_the_product(columns: int) -> None:
    w, upper = five_distributions(256, columns)["normal"], upper_factor(columns)
    moments = torch.linalg.inv(upper.double().mT @ upper.double())

    def harm(decoded: Tensor) -> Tensor:
        d = decoded.double() - w.double()
        return ((d @ moments) * d).sum(dim=1)

    harms = {}
    for rule in ("max", "hessian"):
        g = ak.nvfp4_global_scale(w.abs().max())
        codes, scales, errors = ak.compensate_nvfp4(w, upper, g, rule=rule)
        harms[rule] = harm(ak.dequantize_nvfp4(codes, scales, g, dtype=torch.float32))
        assert torch.allclose(harms[rule], errors.double().square().sum(dim=1), rtol=1e-3)
    plain = harm(ak.fake_quant_nvfp4_weight(w, g))
    assert harms["max"].sum() < 0.8 * plain.sum()
    assert harms["hessian"].sum() < 0.85 * harms["max"].sum()
    scale = ak.fp8_scale(w.abs().max())
    codes, errors = ak.compensate_fp8(w, upper, scale)
    carried_harm = harm(ak.dequantize_fp8(codes, scale, dtype=torch.float32))
    assert torch.allclose(carried_harm, errors.double().square().sum(dim=1), rtol=1e-3)
    assert carried_harm.sum() < 0.8 * harm(ak.fake_quant_fp8(w, scale)).sum()
