"""MXFP4 and block FP8 sources whose codes are kept, from plan to verify."""

import json

import pytest
import torch
import yaml
from searchable import TOKEN_FLAGS, save_searchable
from tiny_models import change_tensors

from autoquant.export.read_back import open_quantized
from autoquant.formats import BF16, FP8, NVFP4, Choice
from autoquant.plan.grouping import find_groups
from autoquant.plan.space_file import load_space, parse_space
from autoquant.source.source import open_source
from autoquant.source.tensors import read_tensor

TOKENS = (
    *("--calibration", "stdlib", "--sequence-length", 64, "--batch-tokens", 1024),
    *("--calibration-tokens", 1024, "--search-tokens", 256),
)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
CAST = {"mlp": Choice.parse("nvfp4/cast"), "self_attn": Choice.parse("fp8/cast")}


def as_mxfp4(weight):
    """Codes two a byte, and the exponents of a power of two for 32 of them: DeepSeek-V4's form."""
    blocks = weight.float().unflatten(-1, (-1, 32))
    exponent = torch.frexp(blocks.abs().amax(dim=-1)).exponent - 3
    scaled = blocks / torch.exp2(exponent.float())[..., None]
    nearest = (scaled.abs()[..., None] - E2M1).abs().argmin(dim=-1) + 8 * (scaled < 0)
    codes = nearest.flatten(-2).to(torch.uint8)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return packed.view(torch.int8), (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def as_blocks(weight):
    """E4M3 codes, and one power of two for 128 x 128 of them, which holds every weight here."""
    exponent = torch.tensor(-8, dtype=torch.int32)
    assert weight.abs().max() < 448 * 2**-8
    codes = (weight.float() / torch.exp2(exponent.float())).to(torch.float8_e4m3fn)
    scale = (exponent + 127).to(torch.uint8).view(1, 1)
    return codes, scale.view(torch.float8_e8m0fnu)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose MLPs are stored in MXFP4, and its attention in FP8."""
    folder = save_searchable("llama", tmp_path_factory.mktemp("cast") / "source")

    def store(tensors):
        for name in [name for name in tensors if ".mlp." in name or ".self_attn." in name]:
            weight = tensors.pop(name)
            codes, scale = as_mxfp4(weight) if ".mlp." in name else as_blocks(weight)
            tensors[name] = codes
            tensors[name.removesuffix("weight") + "scale"] = scale

    change_tensors(folder, store)
    declare(folder, weight_block_size=[128, 128])
    return folder


def declare(folder, **quantization):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"} | quantization
    (folder / "config.json").write_text(json.dumps(config))


def of_part(name):
    return next((choice for part, choice in CAST.items() if f".{part}." in name), BF16)


@pytest.fixture
def exported(source, tmp_path, autoquant):
    def export(choices, *arguments):
        assignment = tmp_path / "assignment.json"
        assignment.write_text(json.dumps({"schema_version": 1, "groups": choices}))
        out = tmp_path / "out"
        done = autoquant(
            *("export", source, "--assignment", assignment, "--out", out, *TOKENS, *arguments)
        )
        return out, done

    return export


def test_a_plan_offers_it_beside_other_codes_where_the_source_stores_such(source, autoquant):
    done = autoquant("plan", source, "--format", "json")
    assert done.exit_code == 0, done.stderr
    for group in json.loads(done.stdout)["groups"]:
        kept = [choice for choice in group["choices"] if "cast" in choice]
        expected = of_part(group["name"])
        assert kept == ([] if expected == BF16 else [str(expected)])
        if kept:
            plain = Choice.parse(f"{expected.format}")
            assert group["choices"][kept[0]] == group["choices"][str(plain)]


def test_no_other_source_has_it(tmp_path):
    groups = find_groups(open_source(save_searchable("llama", tmp_path / "plain")))
    options = load_space("default").options(groups)
    assert not any(choice.is_cast for own in options.choices.values() for choice in own)


def test_powers_of_two_may_be_stored_in_float32_and_say_so(tmp_path):
    folder = save_searchable("llama", tmp_path / "source")
    name = "model.layers.0.mlp.down_proj"

    def store(tensors):
        codes, scale = as_blocks(tensors.pop(f"{name}.weight"))
        tensors[f"{name}.weight"] = codes
        tensors[f"{name}.weight_scale_inv"] = scale.float()

    change_tensors(folder, store)
    declare(folder, weight_block_size=[128, 128])
    assert find_groups(open_source(folder))[name].casts_to == ""
    declare(folder, weight_block_size=[128, 128], scale_fmt="ue8m0")
    assert find_groups(open_source(folder))[name].casts_to == "fp8"


def test_a_space_that_names_a_scale_rule_gets_no_other(source):
    groups = find_groups(open_source(source))
    text = "schema_version: 1\nname: own\nrules: [{match: '*', formats: [%s]}]\n"
    for formats, kept in (("nvfp4/max, fp8", 2), ("nvfp4/cast", 2), ("nvfp4, fp8", 4)):
        choices = parse_space(text % formats, "own").options(groups).choices
        groups_with = [n for n, own in choices.items() if any(c.is_cast for c in own)]
        assert len(groups_with) == 2 * kept, formats
    a16 = load_space("default").with_bf16_inputs().options(groups).choices
    assert {str(c) for c in a16["model.layers.0.mlp.down_proj"] if c.is_cast} == {
        "nvfp4/cast",
        "nvfp4/cast/a16",
    }


def test_a_group_without_such_codes_refuses_it(exported):
    _, done = exported({"model.layers.0.self_attn.qkv": "nvfp4/cast"})
    assert done.exit_code == 2
    assert "its source stores no codes that nvfp4 could keep" in done.stderr
    assert "choose another scale rule" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_an_export_keeps_every_weight_and_is_confirmed(source, exported, autoquant, layout):
    groups = [own.name for own in find_groups(open_source(source)) if of_part(own.name) != BF16]
    out, done = exported({n: str(of_part(n)) for n in groups}, "--layout", layout)
    assert done.exit_code == 0, done.stderr
    headers = open_source(source).headers
    checkpoint = open_quantized(out)
    for name, tensor in checkpoint.tensors():
        assert torch.equal(tensor, read_tensor(headers[name])), name
    forms = {str(c.format) for c in checkpoint.choices.values()}
    assert forms == {str(NVFP4.format), str(FP8.format)}
    found = autoquant("verify", out, "--source", source, "--forward", "--format", "json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["relative_error"] == {"nvfp4": 0.0, "fp8": 0.0}
    scored = autoquant(
        *("score", source, "--checkpoint", out, "--target", "ampere", *TOKENS[:4]),
        *("--report-tokens", 1024, "--format", "json"),
    )
    assert json.loads(scored.stdout)["kl"]["mean"] == 0.0


@pytest.mark.slow
def test_a_search_takes_it_where_it_costs_nothing(source, autoquant, tmp_path):
    space = tmp_path / "space.yaml"
    rules = "[{match: '*', formats: [nvfp4/max, nvfp4/cast, fp8, bf16]}]"
    space.write_text(f"schema_version: 1\nname: own\nrules: {rules}\n")
    done = autoquant(
        *("search", source, "--budget-bpe", 10, "--out", tmp_path / "run", "--no-mlflow"),
        *("--target", "ampere", "--space", space, "--trials", 2, "--calibration", "stdlib"),
        *(*TOKEN_FLAGS, "--format", "json"),
    )
    assert done.exit_code == 0, done.stderr
    chosen = yaml.safe_load((tmp_path / "run" / "assignment.yaml").read_text())["groups"]
    of_mlps = [choice for name, choice in chosen.items() if ".mlp." in name]
    assert {choice for choice in of_mlps if "nvfp4" in choice} == {"nvfp4/cast"}
    assert "fp8/cast" in chosen.values()
