"""The choice `cast`: codes that a source stores are kept, to the bit where their exponents fit."""

import autoquant_kernels as kernels
import pytest
import torch

from autoquant.errors import ConfigError
from autoquant.export.nearest import distance_of
from autoquant.formats import CODES, FP8, GLOBAL_SCALE, NVFP4, SCALE, Choice, choices_of
from autoquant.formats.packed import Statistics

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = torch.cat([E2M1, -E2M1])
CAST_NVFP4, CAST_FP8 = Choice.parse("nvfp4/cast"), Choice.parse("fp8/cast")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mxfp4(*shape: int, lowest: int, highest: int) -> torch.Tensor:
    """Weights of random E2M1 codes and a power of two for 32 of them; the extremes occur."""
    codes = E2M1[torch.randint(0, 16, shape, generator=seeded())]
    blocks = (*shape[:-1], shape[-1] // 32)
    exponents = torch.randint(lowest, highest + 1, blocks, generator=seeded(1))
    exponents.view(-1)[:2] = torch.tensor([lowest, highest])
    codes.view(-1)[32] = 6.0
    return (codes * torch.exp2(exponents.float()).repeat_interleave(32, -1)).bfloat16()


def encoded(weight: torch.Tensor, choice: Choice):
    dims = (1, 2) if weight.ndim == 3 else (0, 1)
    amax = weight.abs().float().amax(dim=dims)
    return choice.format.encode(weight, choice, Statistics(weight_amax=amax))


@pytest.mark.parametrize(("lowest", "highest"), [(-9, 0), (-17, 0), (-30, -14), (3, 20), (5, 5)])
@pytest.mark.parametrize("shape", [(8, 96), (3, 8, 64)])
def test_mxfp4_weights_are_kept_to_the_bit(shape, lowest, highest):
    weight = mxfp4(*shape, lowest=lowest, highest=highest)
    packed = encoded(weight, CAST_NVFP4)
    assert torch.equal(packed.decode(), weight)
    plain = encoded(weight, NVFP4)
    assert {n: (p.dtype, p.shape) for n, p in packed.parts.items()} == {
        n: (p.dtype, p.shape) for n, p in plain.parts.items()
    }
    if highest - lowest > 1:
        assert not torch.equal(plain.decode(), weight)


def test_scales_are_powers_of_two_that_fill_e4m3():
    packed = encoded(mxfp4(8, 96, lowest=-17, highest=0), CAST_NVFP4)
    for scale in (packed.parts[SCALE].float(), packed.parts[GLOBAL_SCALE]):
        assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert packed.parts[SCALE].float().max() == 256
    assert packed.parts[SCALE].float().min() == 2.0**-9


def test_blocks_too_small_for_the_others_are_rounded_to_the_nearest():
    weight = mxfp4(8, 96, lowest=-21, highest=0)
    packed = encoded(weight, CAST_NVFP4)
    least = packed.parts[GLOBAL_SCALE] * 2.0**-9
    error = (packed.decode().float() - weight.float()).abs()
    assert 0 < error.max() <= least / 4
    assert distance_of(weight, packed).wrong == 0


def test_zeros_stay_zeros():
    packed = encoded(torch.zeros(4, 32, dtype=torch.bfloat16), CAST_NVFP4)
    assert not packed.decode().any()
    assert packed.parts[SCALE].float().min() > 0


def test_any_weight_gets_the_nearest_codes_of_its_scales():
    weight = torch.randn(16, 64, generator=seeded()).bfloat16()
    for choice in (CAST_NVFP4, CAST_FP8):
        distance = distance_of(weight, encoded(weight, choice))
        assert distance.wrong == 0
        assert 0 < distance.relative_error < 0.2


@pytest.mark.parametrize("lowest", [0, -4])
def test_e4m3_codes_with_powers_of_two_for_scales_are_kept(lowest):
    codes = torch.randn(64, 64, generator=seeded()).mul(64).to(torch.float8_e4m3fn).float()
    codes = codes.where(codes.abs() >= 1, 0)
    codes[0, 0] = 448
    scale = torch.tensor([[0, lowest], [lowest, -1]]).float().exp2().mul(2.0**-7)
    weight = codes * scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(weight.bfloat16().float(), weight)
    packed = encoded(weight.bfloat16(), CAST_FP8)
    assert packed.parts[SCALE] == 2.0**-7
    assert torch.equal(packed.decode().float(), weight)
    assert torch.equal(packed.parts[CODES][:32, :32].float(), codes[:32, :32])
    assert not torch.equal(encoded((weight * 0.9).bfloat16(), FP8).decode().float(), weight * 0.9)


@pytest.mark.parametrize(
    ("amax", "scale"), [(448.0, 1.0), (449.0, 2.0), (224.0, 0.5), (0.0, 2**-8)]
)
def test_the_scale_of_fp8_is_the_least_power_of_two_that_holds_the_weight(amax, scale):
    from autoquant.formats.cast import fp8_scale

    assert fp8_scale(torch.tensor(amax)).item() == scale
    assert fp8_scale(torch.tensor([amax, 448.0])).tolist() == [scale, 1.0]


def test_how_it_is_written():
    found = [str(choice) for choice in choices_of(FP8.format)]
    assert found == ["fp8", "fp8/gptq", "fp8/refit", "fp8/cast"]
    assert str(Choice.parse("nvfp4/cast/a16")) == "nvfp4/cast/a16"
    assert CAST_FP8.form == "fp8"
    assert CAST_NVFP4.format.needs_moments(CAST_NVFP4) is False
    with pytest.raises(ConfigError, match=r"no rounding 'gptq' under the scale rule 'cast'"):
        Choice.parse("nvfp4/cast/gptq")
    assert (
        kernels.nvfp4_global_scale(1.0)
        != encoded(torch.ones(1, 32, dtype=torch.bfloat16), CAST_NVFP4).parts[GLOBAL_SCALE]
    )


def test_a_polish_leaves_kept_codes_alone():
    from autoquant.plan.assignment import Assignment
    from autoquant.run.polishing import polished_assignment

    plain = Assignment.of({"a": CAST_NVFP4, "b": NVFP4, "c": CAST_FP8})
    polished = polished_assignment(plain)
    assert [str(choice) for _, choice in polished] == ["nvfp4/cast", "nvfp4/max/refit", "fp8/cast"]
