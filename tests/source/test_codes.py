"""Sources whose weights are codes: read as the numbers that the codes stand for, or refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import change_tensors, save_model

from autoquant.errors import SourceError
from autoquant.source.source import open_source
from autoquant.source.tensors import read_tensor

NAME = "model.layers.0.mlp.down_proj.weight"
"""[64, 96] in the model `llama`."""
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_model("llama", tmp_path / "model")


def declare(folder: Path, **quantization) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def replace(folder: Path, make, name: str = NAME) -> None:
    """Put what `make` gives for the weight `name` in its place, by ending of the module's name."""

    def change(tensors):
        own = make(tensors.pop(name))
        tensors |= {name.removesuffix(".weight") + ending: value for ending, value in own.items()}

    change_tensors(folder, change)


def read(folder: Path, name: str = NAME) -> torch.Tensor:
    return read_tensor(open_source(folder).headers[name])


def fp8(shape, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 30).to(torch.float8_e4m3fn)


def exponents(shape, seed=1) -> torch.Tensor:
    """Bytes of powers of two near one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(118, 130, shape, generator=generator, dtype=torch.uint8)


SCALAR, ROW = torch.tensor(0.0123), torch.rand(64, 1, generator=torch.manual_seed(2))
CODES = fp8((64, 96))


@pytest.mark.parametrize(
    ("method", "tensors", "expected"),
    [
        (
            {"quant_method": "fp8"},
            {
                ".weight": CODES,
                ".weight_scale_inv": SCALAR.bfloat16(),
                ".activation_scale": SCALAR,
            },
            CODES.float() * SCALAR.bfloat16().float(),
        ),
        (
            {"quant_method": "fbgemm_fp8"},
            {".weight": CODES, ".weight_scale": ROW, ".input_scale_ub": torch.ones(1)},
            CODES.float() * ROW,
        ),
        (
            {"quant_method": "compressed-tensors"},
            {
                ".weight": CODES,
                ".weight_scale": ROW.bfloat16()[:, 0],
                ".input_scale": torch.ones(1),
            },
            CODES.float() * ROW.bfloat16().float(),
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [32, 32]},
            {".weight": CODES, ".scale": exponents((2, 3)).view(torch.float8_e8m0fnu)},
            CODES.float() * torch.exp2(exponents((2, 3)).float() - 127).kron(torch.ones(32, 32)),
        ),
        (
            {"quant_method": "mxfp8"},
            {".weight": CODES, ".weight_scale": exponents((64, 3))},
            CODES.float() * torch.exp2(exponents((64, 3)).float() - 127).kron(torch.ones(1, 32)),
        ),
        (
            {"quant_method": "fp8"},
            {".weight": CODES.float().to(torch.float8_e5m2), ".weight_scale": SCALAR},
            CODES.float().to(torch.float8_e5m2).float() * SCALAR,
        ),
    ],
    ids=["per tensor", "per row", "per row, flat", "E8M0 blocks", "MXFP8", "E5M2"],
)
def test_fp8_codes_are_read_as_codes_times_scale(folder, method, tensors, expected):
    replace(folder, lambda weight: tensors)
    declare(folder, **method)
    source = open_source(folder)
    assert torch.equal(read_tensor(source.headers[NAME]), expected.bfloat16())
    module = NAME.removesuffix("weight")
    assert [t.name for t in source.headers if t.name.startswith(module)] == [NAME]
    assert source.headers[NAME].dtype == "BF16"
    assert "quantization_config" not in source.config


def mxfp4_numbers(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[.., K] of bytes [.., K / 2] and exponents [.., K / 32], one element after the other."""
    low_first = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return E2M1[low_first.int()] * torch.exp2(scale.float() - 127).repeat_interleave(32, -1)


PACKED = torch.arange(64 * 48).remainder(251).to(torch.uint8).view(64, 48)


@pytest.mark.parametrize(
    ("method", "tensors"),
    [
        (
            {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
            {".weight_packed": PACKED, ".weight_scale": exponents((64, 3))},
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {
                ".weight": PACKED.view(torch.int8),
                ".scale": exponents((64, 3)).view(torch.float8_e8m0fnu),
            },
        ),
        (
            {"quant_method": "mxfp4"},
            {".weight": PACKED.view(torch.float4_e2m1fn_x2), ".weight_scale": exponents((64, 3))},
        ),
    ],
    ids=["compressed-tensors", "DeepSeek-V4", "two a byte"],
)
def test_mxfp4_linears_are_read_without_error(folder, method, tensors):
    replace(folder, lambda weight: tensors)
    declare(folder, **method)
    expected = mxfp4_numbers(PACKED, exponents((64, 3)))
    assert torch.equal(expected.bfloat16().float(), expected)
    assert torch.equal(read(folder), expected.bfloat16())


def test_mxfp4_experts_of_gpt_oss_are_read_as_transformers_reads_them(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = save_model("gpt_oss", tmp_path / "model")
    name = "model.layers.0.mlp.experts.down_proj"
    blocks = torch.arange(4 * 64 * 3 * 16).remainder(253).to(torch.uint8).view(4, 64, 3, 16)
    replace(folder, lambda weight: {"_blocks": blocks, "_scales": exponents((4, 64, 3))}, name=name)
    declare(folder, quant_method="mxfp4")
    found = read(folder, name)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, exponents((4, 64, 3))))
    assert found.shape == (4, 96, 64)


NVFP4 = {
    ".weight": torch.zeros(64, 48, dtype=torch.uint8),
    ".weight_scale": torch.ones(64, 6).to(torch.float8_e4m3fn),
    ".weight_scale_2": torch.tensor(0.1),
    ".input_scale": torch.tensor(0.1),
}
INT4 = {
    ".weight_packed": torch.zeros(64, 12, dtype=torch.int32),
    ".weight_scale": torch.ones(64, 3, dtype=torch.bfloat16),
    ".weight_shape": torch.tensor([64, 96]),
}
OTHERS = {
    "NVFP4": (NVFP4, "which is NVFP4"),
    "NVFP4, compressed-tensors": (
        {
            ".weight_packed": NVFP4[".weight"],
            ".weight_scale": NVFP4[".weight_scale"],
            ".weight_global_scale": torch.ones(1),
        },
        "which is NVFP4",
    ),
    "INT4": (INT4, r"weight_packed is I32 \[64, 12\]"),
    "GPTQ": ({".qweight": torch.zeros(12, 64, dtype=torch.int32)}, "GPTQ or AWQ"),
    "INT8": (
        {".weight": torch.zeros(64, 96, dtype=torch.int8), ".SCB": torch.ones(64)},
        r"weight is I8 \[64, 96\]",
    ),
    "INT8 with a scale for each row": (
        {
            ".weight": torch.zeros(64, 96, dtype=torch.int8),
            ".weight_scale": torch.ones(64, 1),
        },
        r"weight is I8 \[64, 96\]",
    ),
    "HQQ": (
        {".W_q": torch.zeros(3072, dtype=torch.uint8), ".scale": torch.ones(96, 1)},
        "codes of HQQ",
    ),
    "bitsandbytes": (
        {".weight": torch.zeros(3072, 1, dtype=torch.uint8), ".weight.absmax": torch.ones(96)},
        "codes of bitsandbytes",
    ),
    "FP8 without scales": ({".weight": CODES}, r"weight is F8_E4M3 \[64, 96\] without scales"),
}


@pytest.mark.parametrize("how", ["no declaration", "config", "text_config", "a file of its own"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_codes_are_refused_wherever_they_are_declared(folder, autoquant, kind, how):
    tensors, message = OTHERS[kind]
    replace(folder, lambda weight: tensors)
    config = json.loads((folder / "config.json").read_text())
    declaration = {"quant_method": "made_elsewhere"}
    if how == "config":
        declare(folder, **declaration)
    elif how == "text_config":
        text = {"hidden_size": 64, "quantization_config": declaration}
        (folder / "config.json").write_text(json.dumps(config | {"text_config": text}))
    elif how == "a file of its own":
        declaration = {"quantization": {"quant_algo": "made_elsewhere"}}
        (folder / "hf_quant_config.json").write_text(json.dumps(declaration))
    with pytest.raises(SourceError, match=message) as refused:
        open_source(folder)
    assert "already quantized" in refused.value.message
    said = "no file of it says how" if how == "no declaration" else "made_elsewhere"
    assert said in refused.value.message
    assert autoquant("plan", folder).exit_code == 4


@pytest.mark.parametrize("method", [None, "modelopt", "awq"])
def test_fp8_codes_that_no_publisher_declares_are_refused(folder, method):
    replace(folder, lambda weight: {".weight": CODES, ".weight_scale": SCALAR})
    if method is not None:
        declare(folder, quant_method=method)
    with pytest.raises(SourceError, match="already quantized") as refused:
        open_source(folder)
    assert "made from" in refused.value.fix


def test_codes_of_an_export_are_no_source(folder):
    """Its declaration alone is that of a published model."""
    replace(folder, lambda weight: {".weight": CODES, ".weight_scale": SCALAR})
    declare(folder, quant_method="compressed-tensors")
    (folder / "autoquant.json").write_text("{}")
    with pytest.raises(SourceError, match=r"beside autoquant\.json"):
        open_source(folder)


def test_unknown_integers_in_place_of_weights_are_refused(folder):
    def change(tensors):
        for name in [name for name in tensors if "proj" in name]:
            tensors[name.replace("weight", "trellis")] = torch.zeros(
                tensors.pop(name).shape, dtype=torch.int16
            )

    change_tensors(folder, change)
    with pytest.raises(SourceError, match=r"trellis is I16 .* like a large part of its layers"):
        open_source(folder)


def test_integers_that_are_no_codes_stay_as_they_are(folder):
    numbers = torch.arange(40).view(20, 2) + 2**40
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.ids": numbers}))
    assert torch.equal(read(folder, "model.layers.0.mlp.ids"), numbers)


def test_a_declaration_that_no_tensor_shows_is_refused(folder):
    declare(folder, quant_method="compressed-tensors", format="float-quantized")
    with pytest.raises(SourceError, match="none of its tensors is") as refused:
        open_source(folder)
    assert "remove the declaration" in refused.value.fix


def test_the_base_model_that_a_card_names_is_what_to_use(folder):
    replace(folder, lambda weight: NVFP4)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model:\n- some-org/tiny\n---\n")
    with pytest.raises(SourceError) as refused:
        open_source(folder)
    assert "serve it as it is" in refused.value.fix
    assert "some-org/tiny" in refused.value.fix


def test_a_quantized_source_is_named_without_loading_pytorch(folder):
    """That alone takes seconds."""
    replace(folder, lambda weight: NVFP4)
    script = (
        "import sys\nfrom autoquant.cli import cli\n"
        f"try: cli(['plan', {str(folder)!r}])\n"
        "except SystemExit as left: print(left.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["4", "False"], done.stderr
    assert "which is NVFP4" in done.stderr


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_scales_that_share_out_no_codes_are_refused(folder, columns):
    """Three blocks of 32 columns, or one of 96, are possible."""
    replace(folder, lambda weight: {".weight": CODES, ".weight_scale": torch.ones(5, columns)})
    declare(folder, quant_method="fp8")
    with pytest.raises(SourceError, match=rf"weight_scale is F32 \[5, {columns}\]"):
        open_source(folder)


@pytest.mark.parametrize("transposed", [False, True], ids=["[E, N, K]", "[E, K, N]"])
@pytest.mark.parametrize("block", [16, 96])
def test_joined_fp8_experts_are_read_one_by_one(tmp_path, transposed, block):
    """Blocks of 96 rows hold rows of gate and of up."""
    folder = save_model("qwen3_vl_moe", tmp_path / "model")
    container = "model.language_model.layers.0.mlp.experts"
    shape = (4, 64, 96) if transposed else (4, 96, 64)
    codes = fp8(shape)
    counts = [-(-size // block) for size in shape[1:]]
    scale = torch.rand(4, *counts, generator=torch.manual_seed(3)) + 0.5
    joined = f"{container}.gate_up_proj"
    replace(folder, lambda weight: {"": codes, "_scale_inv": scale}, name=joined)
    if not transposed:
        change_tensors(
            folder,
            lambda tensors: tensors.update(
                {
                    name: tensor.transpose(1, 2).contiguous()
                    for name, tensor in tensors.items()
                    if name.endswith("experts.down_proj")
                }
            ),
        )
    declare(folder, quant_method="fp8", weight_block_size=[block, block])
    wide = scale.repeat_interleave(block, 1)[:, : shape[1]]
    wide = wide.repeat_interleave(block, 2)[:, :, : shape[2]]
    expected = (codes.float() * wide).bfloat16()
    expected = expected.transpose(1, 2) if transposed else expected
    source = open_source(folder)
    for expert in range(4):
        gate, up = (
            read_tensor(source.headers[f"{container}.{expert}.{part}_proj.weight"])
            for part in ("gate", "up")
        )
        assert torch.equal(torch.cat([gate, up]), expected[expert])
    whole = source.headers.joined[f"{container}.0.up_proj.weight"]
    assert torch.equal(read_tensor(whole), expected.transpose(1, 2) if transposed else expected)
