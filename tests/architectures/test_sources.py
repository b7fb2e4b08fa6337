"""Sources as publishers store them: block FP8, draft layers, joined experts, their own code."""

import json
import re

import numpy as np
import pytest
import torch
from cells import Journey
from published import BLOCK, change_config, save_published
from searchable import save_searchable
from tiny_models import change_tensors

from autoquant.errors import SourceError
from autoquant.export.export import export
from autoquant.export.verify import verify
from autoquant.formats import FP8
from autoquant.model.binding import Names
from autoquant.model.loading import load_model
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.headers import Headers
from autoquant.source.source import open_source
from autoquant.source.tensors import read_tensor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory):
    return save_published("deepseek_v3-fp8", tmp_path_factory.mktemp("fp8") / "source")


@pytest.fixture
def own_blocks(tmp_path):
    """A source in block FP8 that a test may damage."""
    return save_published("minimax_m2-fp8", tmp_path / "source")


def stored(folder):
    return Headers.read(tuple(sorted(folder.glob("*.safetensors"))))


def e4m3(codes):
    """The numbers of E4M3 codes, by the format's definition, float32."""
    codes = codes.astype(np.int64)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    return np.where(codes & 128, -magnitude, magnitude).astype(np.float32)


def bfloat16_bits(numbers):
    """float32 rounded to the nearest BF16, ties to even, as its 16 bits."""
    bits = numbers.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def dequantized(codes, scale):
    """BF16 bits of codes [N, K] with scales of blocks, one element's block at a time."""
    rows, columns = np.indices(codes.shape) // BLOCK
    return bfloat16_bits(e4m3(codes) * scale[rows, columns])


def test_blocks_are_dequantized_to_the_bit_on_disk_and_in_memory(in_blocks):
    raw, source = stored(in_blocks), open_source(in_blocks)
    model = load_model(in_blocks, CPU).model
    names, parameters = Names(model), dict(model.named_parameters())
    compared = 0
    for header in raw:
        if header.dtype != "F8_E4M3":
            continue
        codes = read_tensor(header).view(torch.uint8).numpy()
        scale = read_tensor(raw[f"{header.name}_scale_inv"]).numpy()
        expected = dequantized(codes, scale)
        found = read_tensor(source.headers[header.name])
        assert np.array_equal(found.view(torch.uint16).numpy(), expected)
        memory = parameters.get(names.locate(header.name)[0])
        if memory is not None and memory.shape == found.shape:
            compared += 1
            assert memory.equal(found)
    assert compared > 10
    assert any(size % BLOCK for header in raw for size in header.shape)


def test_elements_are_those_of_the_weights(in_blocks):
    source, raw = open_source(in_blocks), stored(in_blocks)
    scales = [header for header in raw if header.name.endswith("_scale_inv")]
    assert scales
    assert source.headers.elements == raw.elements - sum(scale.elements for scale in scales)
    assert source.headers.stored_bytes == raw.bytes
    assert not any(name.endswith("_scale_inv") for name in source.headers.tensors)


def test_what_stays_bf16_is_written_dequantized_and_declared_anew(in_blocks, tmp_path):
    source = open_source(in_blocks)
    groups = find_groups(source)
    assignment = Assignment.of({groups.groups[0].name: FP8})
    amax = dict.fromkeys((linear.input_scale_set for linear in groups.linears), 1.0)
    target = tmp_path / "out"
    export(source, groups, assignment, amax, target)
    assert verify(target, source).ok
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "modelopt"
    exported = stored(target)
    assert not any("scale_inv" in header.name for header in exported)
    draft = "model.layers.2.mlp.experts.1.up_proj.weight"
    assert read_tensor(exported[draft]).equal(read_tensor(source.headers[draft]))

    export(source, groups, Assignment.of({}), amax, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert stored(tmp_path / "plain").elements == source.headers.elements


def fails(folder, message):
    with pytest.raises(SourceError, match=message):
        open_source(folder)


NAME = "model.layers.0.self_attn.o_proj.weight"


def test_codes_without_scales(own_blocks):
    change_tensors(own_blocks, lambda tensors: tensors.pop(f"{NAME}_scale_inv"))
    fails(own_blocks, rf"holds {re.escape(NAME)}, in E4M3 without .*_scale_inv")


def test_scales_without_codes(own_blocks):
    change_tensors(own_blocks, lambda tensors: tensors.pop(NAME))
    fails(own_blocks, rf"holds {re.escape(NAME)}_scale_inv, and no E4M3 weight belongs to it")


def test_scales_of_other_blocks_than_the_config_declares(own_blocks):
    config = json.loads((own_blocks / "config.json").read_text())["quantization_config"]
    change_config(own_blocks, quantization_config=config | {"weight_block_size": [64, 64]})
    fails(own_blocks, r"_scale_inv is F32 \[\d, \d\]; blocks of 64 x 64 give")


def test_fp8_of_another_kind_is_quantized_already(own_blocks):
    change_config(own_blocks, quantization_config={"quant_method": "fp8"})
    change_tensors(own_blocks, drop_scales)
    fails(own_blocks, r"is already quantized \(quantization_config: fp8\)")


def drop_scales(tensors):
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        del tensors[name]


def test_joined_experts_are_the_matrices_that_transformers_computes_with(tmp_path):
    folder = save_published("qwen3_vl_moe", tmp_path / "source")
    source = open_source(folder)
    experts = load_model(folder, CPU).model.model.language_model.layers[1].mlp.experts
    container = "model.language_model.layers.1.mlp.experts"
    for number in range(4):
        gate, up, down = (
            read_tensor(source.headers[f"{container}.{number}.{product}_proj.weight"])
            for product in ("gate", "up", "down")
        )
        assert torch.cat([gate, up]).equal(experts.gate_up_proj[number])
        assert down.equal(experts.down_proj[number])


def test_joined_experts_in_either_orientation_are_the_same_model(tmp_path):
    published = save_published("qwen3_vl_moe", tmp_path / "published")
    saved = save_published("qwen3_vl_moe", tmp_path / "saved")
    change_tensors(saved, transpose_experts)
    one, other = open_source(published), open_source(saved)
    assert one.headers.tensors.keys() == other.headers.tensors.keys()
    for header in one.headers:
        assert read_tensor(header).equal(read_tensor(other.headers[header.name]))


def transpose_experts(tensors):
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensors[name] = tensor.transpose(1, 2).contiguous()


def test_joined_experts_are_apart_in_every_layer_or_in_none(tmp_path):
    """Behind one joined tensor SGLang drops the experts of other layers without a word."""
    source = open_source(save_published("qwen3_vl_moe", tmp_path / "source"))
    groups = find_groups(source)
    first, second = (group for group in groups if group.role == "experts")
    amax = dict.fromkeys((linear.input_scale_set for linear in groups.linears), 1.0)
    export(source, groups, Assignment.of({first.name: FP8}), amax, tmp_path / "out")
    exported = stored(tmp_path / "out").tensors
    assert not any(f"{group.name}.gate_up_proj" in exported for group in (first, second))
    for linear in second.linears:
        name = f"{linear.name}.weight"
        assert read_tensor(exported[name]).equal(read_tensor(source.headers[name]))
    assert f"{first.name}.3.gate_proj.input_scale" in exported
    assert verify(tmp_path / "out", source).ok

    attention = next(group for group in groups if group.role == "qkv")
    export(source, groups, Assignment.of({attention.name: FP8}), amax, tmp_path / "whole")
    exported = stored(tmp_path / "whole").tensors
    whole = f"{second.name}.gate_up_proj"
    assert read_tensor(exported[whole]).equal(read_tensor(stored(source.path)[whole]))


def test_experts_that_engines_cannot_load_are_closed_and_say_why(tmp_path, autoquant):
    source = save_published("gpt_oss", tmp_path / "source")
    plan = Journey(source, tmp_path, autoquant).plan()
    assert {group["role"] for group in plan["groups"]} == {"qkv", "o", "head"}
    reason = "experts stored as one 3-D tensor, whose quantized form engines do not load"
    assert plan["fixed"][reason] > 0


def test_attention_with_an_indexer_is_closed_and_says_why(tmp_path, autoquant):
    source = save_published("minimax_m3_vl", tmp_path / "source")
    plan = Journey(source, tmp_path, autoquant).plan()
    groups = {group["name"]: group for group in plan["groups"]}
    closed = groups["language_model.model.layers.1.self_attn.qkv"]["closed"]
    assert closed.keys() == {"nvfp4", "fp8"}
    assert "indexer" in closed["fp8"]
    assert groups["language_model.model.layers.0.self_attn.qkv"]["closed"] == {}


def test_code_of_the_model_is_copied_and_not_run(tmp_path, autoquant):
    source = save_searchable("minimax_m2", tmp_path / "source")
    code = 'raise RuntimeError("code of the model was run")\n'
    (source / "modeling_own.py").write_text(code)
    change_config(source, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    journey = Journey(source, tmp_path, autoquant)
    plan = journey.plan()
    names = {group["name"]: "fp8" for group in plan["groups"] if "fp8" in group["choices"]}
    file = tmp_path / "fp8.json"
    file.write_text(json.dumps({"schema_version": 1, "groups": names}))
    arguments = ("export", source, "--assignment", file, *journey.tokens)
    journey.json(*arguments, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "modeling_own.py").read_text() == code
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]

    trusted = autoquant(*arguments, "--trust-remote-code", "--out", tmp_path / "trusted")
    assert trusted.exit_code == 4
    assert "code of the model was run" in trusted.stderr
