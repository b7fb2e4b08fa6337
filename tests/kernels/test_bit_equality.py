"""Every backend returns the reference's bits, and a fake-quantized weight is what is exported."""

import autoquant_kernels as ak
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    RULES,
    all_outputs,
    assert_same_bits,
    edge_blocks,
    every_bfloat16,
    five_distributions,
    forced,
    fused_backends,
    moments_of,
    tie_grid,
)
from torch import Tensor

BACKENDS = fused_backends()


def compare(x: Tensor, amax: float, backend: str) -> None:
    with forced("reference"):
        expected = all_outputs(x, amax)
    with forced(backend) as device:
        got = all_outputs(x.to(device), amax)
    for name, tensor in expected.items():
        try:
            assert_same_bits(tensor, got[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amax", [3.0, 1e-4, 1e-36, 1e30])
def test_edge_blocks(backend: str, dtype: torch.dtype, amax: float) -> None:
    compare(edge_blocks().to(dtype), amax, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [2.0**-10, pytest.param(0.00037, marks=pytest.mark.slow)])
def test_ties(backend: str, step: float) -> None:
    compare(tie_grid(step), 6 * 448 * step, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("blocks", [1, 15, 16, 17, 300])
def test_any_number_of_blocks(backend: str, blocks: int) -> None:
    compare(five_distributions(blocks, 16)["normal"].bfloat16(), 4.0, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("amax", [(3.0, 0.25, 1.0), (1e-36, 3.0, 1e30)])
@pytest.mark.parametrize("columns", [32, 4112])
def test_matrices_with_their_own_scales_equal_each_alone(
    backend: str, amax: tuple[float, ...], columns: int
) -> None:
    x = torch.stack(
        [five_distributions(3, columns)[name] for name in ("normal", "uniform", "laplace")]
    )
    x = (x * torch.tensor(amax)[:, None, None] / 4).bfloat16()
    with forced("reference"):
        alone = [all_outputs(matrix, largest) for matrix, largest in zip(x, amax, strict=True)]
    with forced(backend) as device:
        got = all_outputs(x.to(device), torch.tensor(amax))
    for name, tensor in got.items():
        assert_same_bits(torch.stack([each[name] for each in alone]), tensor)


@pytest.mark.parametrize("backend", BACKENDS[:-1])
@given(
    block=st.lists(st.floats(width=32), min_size=16, max_size=16),
    amax=st.floats(min_value=2.0**-100, max_value=2.0**100, width=32),
)
@settings(max_examples=50, deadline=None)
def test_any_block(backend: str, block: list[float], amax: float) -> None:
    compare(torch.tensor([block]), amax, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bfloat16_in_one_position(backend: str) -> None:
    blocks = every_bfloat16()
    if backend == "triton" and not torch.cuda.is_available():
        blocks = blocks[::5]  # every one of them takes its interpreter half a minute
    compare(blocks, 3.0, backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(five_distributions(1, 16)))
def test_ten_million_random_elements(name: str) -> None:
    x = five_distributions(2048, 1024)[name].bfloat16()
    for backend in BACKENDS:
        if backend.values != ("triton",) and not backend.marks[0].args[0]:
            compare(x, float(x.abs().max()), backend.values[0])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scored_weight_is_what_is_exported(backend: str, rule: str, dtype: torch.dtype) -> None:
    w = torch.cat((edge_blocks(), five_distributions(64, 16)["student_t"])).to(dtype)
    g = ak.nvfp4_global_scale(5.0, rule)
    moments = moments_of(rule, 16)
    with forced(backend) as device:
        moments = moments if moments is None else moments.to(device)
        codes, scales = ak.quantize_nvfp4(w.to(device), g, rule=rule, moments=moments)
        exported = ak.dequantize_nvfp4(codes, scales, g, dtype=dtype)
        scored = ak.fake_quant_nvfp4_weight(w.to(device), g, rule=rule, moments=moments)
    assert_same_bits(exported.cpu(), scored)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nan_and_infinity(backend: str) -> None:
    x = torch.ones(4, 16)
    x[1, 3], x[2, 3], x[3, 3] = torch.nan, torch.inf, -torch.inf
    with forced(backend) as device:
        y = ak.fake_quant_nvfp4(x.to(device), ak.nvfp4_global_scale(1.0)).cpu()
        z = ak.fake_quant_fp8(x.to(device), ak.fp8_scale(1.0)).cpu()
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()
    assert y[2, 3] == -y[3, 3] == 1.0
    assert z.isnan().sum() == 1
    assert z[2, 3] == -z[3, 3] == 1.0


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_signs_of_zero(backend: str) -> None:
    x = torch.tensor([-0.0, 0.0, -1e-6, 1e-6, 1.0] + [0.0] * 11)[None]
    with forced(backend) as device:
        dynamic = ak.fake_quant_nvfp4(x.to(device), ak.nvfp4_global_scale(1.0)).cpu()
        codes, _ = ak.quantize_nvfp4(x.to(device), ak.nvfp4_global_scale(1.0))
    assert dynamic.signbit()[0, :4].tolist() == [True, False, True, False]
    assert codes.cpu()[0, :2].tolist() == [0x00, 0x08]
