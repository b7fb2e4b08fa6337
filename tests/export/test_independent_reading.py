"""The independent reading of codes and inputs, bit for bit that of the kernels."""

import autoquant_kernels as kernels
import pytest
import torch
from exported import NVFP4_MSE, input_amax, uniform
from safetensors.torch import load_file
from tiny_models import save_model

from autoquant.export.export import export
from autoquant.export.layouts.base import Layout
from autoquant.export.read_back import open_quantized
from autoquant.formats import FP8, Choice
from autoquant.independent.products import rounded
from autoquant.independent.stored import InputQuantizer, read_stored, read_tensors
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return open_source(save_model("qwen3_moe", folder / "source", shard_size="60KB"))


@pytest.mark.parametrize("choice", [NVFP4_MSE, FP8, Choice.parse("nvfp4/a16")])
@pytest.mark.parametrize("layout", Layout)
def test_weights_and_input_scales_are_those_of_the_reader(source, tmp_path, choice, layout):
    groups = find_groups(source)
    assignment = uniform(groups, choice)
    out = tmp_path / "out"
    export(source, groups, assignment, input_amax(groups), out, layout=layout)
    checkpoint, found = open_quantized(out), read_stored(out)
    assert found.quantized == checkpoint.choices.keys()
    expected = dict(checkpoint.tensors())
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found.tensors[name].float(), tensor.float(), rtol=2**-7, atol=0)
    scales = checkpoint.input_scales
    assert found.inputs.keys() == scales.keys()
    for name, own in found.inputs.items():
        assert own.bits == (8 if choice == FP8 else 4)
        assert own.scale == pytest.approx(scales[name], rel=1e-6)


def test_every_file_of_an_index_is_read(source):
    expected = {}
    for file in source.path.glob("*.safetensors"):
        expected |= load_file(file)
    found = read_tensors(source.path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("scale", [0.003, 0.02, 1e-5])
def test_inputs_are_rounded_as_kernels_round_them(scale):
    x = torch.randn(64, 96, generator=torch.manual_seed(0)).bfloat16()
    x[3] = 0
    x[5, :16] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6] * 2)
    assert torch.equal(rounded(x, InputQuantizer(8, scale)), kernels.fake_quant_fp8(x, scale))
    assert torch.equal(rounded(x, InputQuantizer(4, scale)), kernels.fake_quant_nvfp4(x, scale))
