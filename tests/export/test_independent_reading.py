"""The independent reading of codes and inputs, bit for bit that of the kernels."""

import json

import autoquant_kernels as kernels
import pytest
import torch
from exported import NVFP4_MSE, input_amax, uniform
from safetensors.torch import load_file, save_file
from tiny_models import save_model

from autoquant.errors import SourceError
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


def test_inputs_that_give_their_own_scale_are_rounded_by_it():
    x = torch.randn(6, 64, generator=torch.manual_seed(0)).bfloat16()
    x[1] *= 1000
    x[2] = 0
    by_token = [kernels.fake_quant_fp8(row[None], row.abs().max().item() / 448) for row in x[:2]]
    found = rounded(x, InputQuantizer(8))
    assert torch.equal(found[:2], torch.cat(by_token))
    assert torch.equal(found[2], x[2])
    exponents = x.reshape(-1, 32).abs().amax(dim=1).float().frexp().exponent - 1
    by_block = [
        kernels.fake_quant_fp8(block[None], 2.0 ** (exponent.item() - 8))
        for block, exponent in zip(x.reshape(-1, 32), exponents, strict=True)
        if block.any()
    ]
    found = rounded(x, InputQuantizer(8, block=32)).reshape(-1, 32)
    assert torch.equal(found[:4], torch.cat(by_block)[:4])
    assert torch.equal(found[6:], torch.cat(by_block)[4:])
    assert not found[4:6].any()


TOKEN = {"num_bits": 8, "strategy": "token", "group_size": None, "dynamic": True}
BLOCK = {"num_bits": 8, "strategy": "group", "group_size": 32, "dynamic": True}


def save_other(folder, *schemes):
    """A checkpoint as other tools write them: FP8 by rows and MXFP8."""
    generator = torch.manual_seed(1)
    codes = torch.randn(4, 64, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 1, generator=generator)
    exponents = torch.tensor([[120, 127], [128, 126], [127, 121], [0, 254]], dtype=torch.uint8)
    tensors = {"a.weight": codes, "a.weight_scale": scales}
    tensors |= {"b.weight": codes.clone(), "b.weight_scale": exponents}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    groups = {
        f"group_{number}": {"targets": targets, "input_activations": inputs}
        for number, (targets, inputs) in enumerate(schemes)
    }
    config = {"quantization_config": {"config_groups": groups}}
    (folder / "config.json").write_text(json.dumps(config))
    return codes.float(), scales, exponents


def test_checkpoints_of_other_tools_are_read(tmp_path):
    schemes = ((["Linear"], BLOCK), (["re:^a$"], TOKEN), (["c"], None))
    codes, scales, exponents = save_other(tmp_path / "out", *schemes)
    found = read_stored(tmp_path / "out")
    assert found.inputs == {"a": InputQuantizer(8), "b": InputQuantizer(8, block=32)}
    assert torch.equal(found.tensors["a.weight"], (codes * scales).bfloat16())
    powers = (2.0 ** (exponents.double() - 127)).repeat_interleave(32, dim=1)
    assert torch.equal(found.tensors["b.weight"], (codes * powers.float()).bfloat16())


def test_weights_alone_have_inputs_in_bf16(tmp_path):
    save_other(tmp_path / "out", (["a", "b"], None))
    assert read_stored(tmp_path / "out").inputs == {}


def test_another_way_to_round_inputs_is_refused(tmp_path):
    save_other(tmp_path / "out", (["Linear"], TOKEN | {"num_bits": 4}))
    with pytest.raises(SourceError, match="rounds the inputs of a in a way"):
        read_stored(tmp_path / "out")
