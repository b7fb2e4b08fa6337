"""Damage of every kind to an exported checkpoint, each found and named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import NVFP4_MAX, change_tensors, input_amax, mixed
from tiny_models import save_model

from autoquant.errors import SourceError
from autoquant.export.export import export
from autoquant.export.read_back import open_quantized
from autoquant.export.verify import require_sound, verify
from autoquant.formats import FP8
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import Source, open_source

Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.0.self_attn.o_proj"  # noqa: E741
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def source(tmp_path) -> Source:
    return open_source(save_model("llama", tmp_path / "source"))


@pytest.fixture
def checkpoint(source, tmp_path) -> Path:
    groups = find_groups(source)
    assignment = mixed(groups).replace(
        {"model.layers.0.self_attn.qkv": NVFP4_MAX, "model.layers.0.self_attn.o_proj": FP8}
    )
    export(source, groups, assignment, input_amax(groups), tmp_path / "out")
    return tmp_path / "out"


def edit(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def problems(checkpoint: Path, source: Source | None = None, said: str = "is damaged") -> str:
    verification = verify(checkpoint, source)
    assert not verification.ok
    with pytest.raises(SourceError, match=said) as caught:
        require_sound(verification)
    assert caught.value.exit_code == 4
    return "\n".join(verification.problems)


def test_what_is_foreign_is_a_field_and_not_a_wording(checkpoint, source, tmp_path):
    other = open_source(save_model("llama", tmp_path / "other", seed=1))
    assert verify(checkpoint, other).is_foreign
    own = verify(checkpoint, source)
    assert not own.is_foreign
    assert own.to_dict()["is_foreign"] is False
    with pytest.raises(SourceError, match="cannot be held against this model"):
        require_sound(replace(own, problems=("made from something else.",), is_foreign=True))
    with pytest.raises(SourceError, match="is damaged"):
        require_sound(replace(own, problems=("autoquant.json names another source.",)))


def test_a_digest_of_an_earlier_version_is_no_reason_to_call_a_source_foreign(
    checkpoint, source, tmp_path
):
    edit(checkpoint / "autoquant.json", lambda data: data.update(source_digest="ab" * 32))
    own = verify(checkpoint, source)
    assert own.ok
    assert not own.is_foreign
    (note,) = own.notes
    assert "a digest of an earlier version" in note
    assert own.to_dict()["notes"] == [note]
    other = open_source(save_model("llama", tmp_path / "other", seed=1))
    assert not verify(checkpoint, other).is_foreign
    assert "codes are not the nearest" in problems(checkpoint, other)


def test_sound_checkpoint_passes_with_and_without_its_source(checkpoint, source):
    for verification in (verify(checkpoint), verify(checkpoint, source)):
        assert verification.ok
        assert verification.notes == ()
        require_sound(verification)
        assert verification.bpe == 8 * verification.checkpoint_bytes / source.headers.elements
        assert sum(verification.linears.values()) == len(find_groups(source).linears)
    assert verify(checkpoint).relative_error == {}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", [f"{Q}.weight_scale_2", f"{Q}.input_scale", f"{O}.weight_scale", f"{O}.input_scale"]
)
def test_scale_that_is_not_positive_and_finite(checkpoint, name, value):
    change_tensors(checkpoint, lambda tensors: tensors[name].fill_(value))
    assert f"{name} is {value}" in problems(checkpoint)


@pytest.mark.parametrize("name", [f"{Q}.weight_scale_2", f"{Q}.input_scale"])
def test_scale_that_its_group_does_not_share(checkpoint, name):
    def nudge(tensors: Tensors) -> None:
        tensors[name] = torch.nextafter(tensors[name], torch.tensor(1.0))

    change_tensors(checkpoint, nudge)
    assert "they share" in problems(checkpoint)


@pytest.mark.parametrize("byte", [0x7F, 0xFF, 0x00, 0xB8])
def test_block_scale_that_is_nan_zero_or_negative(checkpoint, byte):
    def spoil(tensors: Tensors) -> None:
        tensors[f"{Q}.weight_scale"].view(torch.uint8)[0, 0] = byte

    change_tensors(checkpoint, spoil)
    assert Q in problems(checkpoint)


def test_fp8_code_that_is_nan(checkpoint):
    def spoil(tensors: Tensors) -> None:
        tensors[f"{O}.weight"].view(torch.uint8)[3, 3] = 0x7F

    change_tensors(checkpoint, spoil)
    assert f"{O} holds an E4M3 NaN" in problems(checkpoint)


@pytest.mark.parametrize(("name", "flip"), [(Q, 0x04), (Q, 0x80), (O, 0x40), (O, 0x80)])
def test_one_changed_code_is_found_against_the_source(checkpoint, source, name, flip):
    def spoil(tensors: Tensors) -> None:
        codes = tensors[f"{name}.weight"].view(torch.uint8)
        codes.view(-1)[codes.view(-1).bitwise_and(0x66).argmax()] ^= flip

    change_tensors(checkpoint, spoil)
    assert f"{name}: 1 of" in problems(checkpoint, source)


def test_block_scale_of_another_block_is_found_against_the_source(checkpoint, source):
    def spoil(tensors: Tensors) -> None:
        scales = tensors[f"{Q}.weight_scale"].view(torch.uint8)
        scales[0, 0] -= 8

    change_tensors(checkpoint, spoil)
    assert f"{Q}: " in problems(checkpoint, source)


def test_untouched_tensor_that_differs_from_the_source(checkpoint, source):
    change_tensors(checkpoint, lambda tensors: tensors["model.norm.weight"][0].add_(1))
    assert "model.norm.weight was to stay as it is" in problems(checkpoint, source)


def test_untouched_tensor_with_nan_is_found_without_a_source(checkpoint):
    change_tensors(checkpoint, lambda tensors: tensors["model.norm.weight"][0].fill_(float("nan")))
    assert "model.norm.weight holds NaN or Inf" in problems(checkpoint)


def test_missing_tensor(checkpoint, source):
    change_tensors(checkpoint, lambda tensors: tensors.pop("model.norm.weight"))
    assert "model.norm.weight of the source is missing" in problems(checkpoint, source)
    assert "source_elements" in problems(checkpoint)


def test_tensor_that_the_source_lacks(checkpoint, source):
    change_tensors(checkpoint, lambda tensors: tensors.update(extra=torch.ones(3)))
    assert "extra is not in the source" in problems(checkpoint, source)


def test_another_source_of_the_same_shape(checkpoint, tmp_path):
    other = open_source(save_model("llama", tmp_path / "other", seed=1))
    found = problems(checkpoint, other, said="cannot be held against this model")
    assert "autoquant.json names another source" in found
    assert "codes are not the nearest" in found


def test_source_of_another_shape(checkpoint, tmp_path):
    other = open_source(save_model("llama", tmp_path / "other", intermediate_size=128))
    found = problems(checkpoint, other, said="cannot be held against this model")
    assert "stands for [96, 64], and the source has [128, 64]" in found


def test_group_of_two_formats(source, tmp_path):
    """Formats of a group's parts that each are sound by themselves."""
    groups = find_groups(source)
    for choice in (NVFP4_MAX, FP8):
        assignment = Assignment.of({"model.layers.0.self_attn.qkv": choice})
        export(source, groups, assignment, input_amax(groups), tmp_path / choice.format.name)

    from safetensors.torch import load_file

    other = load_file(tmp_path / "fp8" / "model.safetensors")

    def mix(tensors: Tensors) -> None:
        del tensors[f"{Q}.weight_scale_2"]
        tensors |= {name: tensor for name, tensor in other.items() if name.startswith(Q)}
        tensors.update({name: tensor for name, tensor in other.items() if name.startswith(Q)})

    change_tensors(tmp_path / "nvfp4", mix)
    assert "model.layers.0.self_attn.qkv is stored in fp8 and nvfp4" in problems(tmp_path / "nvfp4")


@pytest.mark.parametrize("end", ["weight_scale_2", "input_scale"])
def test_missing_scale_is_an_error_at_once(checkpoint, end):
    change_tensors(checkpoint, lambda tensors: tensors.pop(f"{Q}.{end}"))
    with pytest.raises(SourceError, match=rf"without {Q}\.{end}"):
        open_quantized(checkpoint)


def test_quantized_weight_without_its_scale(checkpoint):
    change_tensors(checkpoint, lambda tensors: tensors.pop(f"{Q}.weight_scale"))
    with pytest.raises(SourceError, match=r"without \.weight_scale|no quantized weight"):
        open_quantized(checkpoint)


def test_scale_without_a_weight(checkpoint):
    change_tensors(checkpoint, lambda tensors: tensors.update({"x.input_scale": torch.ones(())}))
    with pytest.raises(SourceError, match=r"holds x\.input_scale, and no quantized weight"):
        open_quantized(checkpoint)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{Q}.weight_scale_2", torch.ones(1), r"F32 \[1\]; NVFP4 stores F32 \[\]"),
        (f"{Q}.input_scale", torch.ones((), dtype=torch.bfloat16), r"BF16 \[\]; NVFP4 stores F32"),
        (f"{Q}.weight", torch.ones(64, 16, dtype=torch.uint8), r"weight_scale is F8_E4M3"),
        (f"{Q}.weight", torch.ones(64, 32, 1, dtype=torch.uint8), "has two axes"),
        (f"{O}.weight_scale", torch.ones(64), r"F32 \[64\]; FP8 stores F32 \[\]"),
    ],
)
def test_tensor_of_the_wrong_shape_is_an_error_at_once(checkpoint, name, value, message):
    change_tensors(checkpoint, lambda tensors: tensors.update({name: value}))
    with pytest.raises(SourceError, match=message):
        open_quantized(checkpoint)


def test_truncated_file(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SourceError, match="is truncated"):
        verify(checkpoint)


def test_missing_folder(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        verify(tmp_path / "absent")


def test_missing_config(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(SourceError, match=r"holds no config\.json"):
        verify(checkpoint)


def test_other_layout(checkpoint):
    edit(checkpoint / "config.json", lambda c: c["quantization_config"].update(quant_method="awq"))
    with pytest.raises(SourceError, match="'awq'"):
        verify(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"]["quantized_layers"].pop(Q), "disagree"),
        (lambda c: c["quantization_config"]["ignore"].append(Q), "engines take it for bf16"),
        (lambda c: c["quantization_config"]["ignore"].append("layers.0.self"), "disagree"),
        (lambda c: c["quantization_config"].pop("ignore"), "lacks what engines need: 'ignore'"),
        (lambda c: c["quantization_config"].pop("kv_cache_scheme"), "kv_cache_scheme"),
        (lambda c: c.pop("quantization_config"), "one is missing"),
    ],
)
def test_declaration_that_differs_from_what_is_stored(checkpoint, change, message):
    edit(checkpoint / "config.json", change)
    assert message in problems(checkpoint)


def test_missing_second_declaration(checkpoint):
    (checkpoint / "hf_quant_config.json").unlink()
    assert "one is missing" in problems(checkpoint)


def test_both_declarations_wrong_alike(checkpoint):
    wrong = {"quant_algo": "FP8"}
    edit(
        checkpoint / "config.json",
        lambda c: c["quantization_config"]["quantized_layers"].update({Q: wrong}),
    )
    edit(
        checkpoint / "hf_quant_config.json",
        lambda c: c["quantization"]["quantized_layers"].update({Q: wrong}),
    )
    assert f"{Q} is stored in nvfp4, and engines take it for fp8" in problems(checkpoint)


def test_declaration_beside_an_unquantized_model(source, tmp_path):
    export(source, find_groups(source), Assignment.of({}), {}, tmp_path / "out")
    (tmp_path / "out" / "hf_quant_config.json").write_text("{}")
    assert "nothing is quantized" in problems(tmp_path / "out")


def test_sizes_that_are_said_wrongly(checkpoint):
    edit(checkpoint / "autoquant.json", lambda said: said.update(checkpoint_bytes=1))
    assert "says checkpoint_bytes 1" in problems(checkpoint)


def test_index_of_the_wrong_size(source, tmp_path):
    sharded = open_source(save_model("llama", tmp_path / "sharded", shard_size="60KB"))
    groups = find_groups(sharded)
    export(sharded, groups, mixed(groups), input_amax(groups), tmp_path / "out")
    index = tmp_path / "out" / "model.safetensors.index.json"
    edit(index, lambda said: said["metadata"].update(total_size=7))
    assert "says 7 bytes" in problems(tmp_path / "out")
