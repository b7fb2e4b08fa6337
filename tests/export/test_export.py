"""Exports: the right numbers, nothing lost, whole or not at all."""

import json
import os
from pathlib import Path

import autoquant_kernels as kernels
import pytest
import torch
import yaml
from exported import (
    NVFP4_MAX,
    NVFP4_MSE,
    export_mixed,
    input_amax,
    load_tensors,
    mixed,
    tree,
    uniform,
)
from filelock import FileLock
from safetensors.torch import load_file, save_file
from searchable import TOKEN_FLAGS, save_searchable
from tiny_models import MODELS, save_model

from autoquant.errors import ConfigError, RunConflict, SourceError
from autoquant.export.card import CardFacts, KlRow
from autoquant.export.export import export
from autoquant.export.read_back import open_quantized
from autoquant.export.verify import verify
from autoquant.files import write_atomic
from autoquant.formats import BF16, FP8, NVFP4, Choice
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import Source, open_source

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@pytest.fixture
def source(tmp_path) -> Source:
    return open_source(save_model("llama", tmp_path / "source"))


def run(source: Source, target: Path, choice: Choice = NVFP4_MAX, **more: object) -> None:
    groups = find_groups(source)
    export(source, groups, uniform(groups, choice), input_amax(groups), target, **more)


def decoded(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The formula of the layout, apart from the project's own code."""
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * scale
    nibbles = torch.stack((weight & 0xF, weight >> 4), dim=-1).reshape(weight.shape[0], -1).long()
    sign = 1.0 - 2.0 * (nibbles >> 3)
    blocks = (sign * E2M1[nibbles & 7]).reshape(*scale.shape, 16)
    step = scale.float() * tensors[f"{name}.weight_scale_2"]
    return (blocks * step[..., None]).reshape(weight.shape[0], -1)


@pytest.mark.parametrize("kind", MODELS)
def test_exports_of_real_models_are_sound(kind, tmp_path):
    source = open_source(save_model(kind, tmp_path / "source", shard_size="80KB"))
    result = export_mixed(source, tmp_path / "out")
    verification = verify(tmp_path / "out", source)
    assert verification.problems == ()
    assert verification.checkpoint_bytes == result.checkpoint_bytes
    assert set(verification.relative_error) == {"nvfp4", "fp8"}
    assert verification.relative_error["nvfp4"] < 0.12
    assert verification.relative_error["fp8"] < 0.04


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe", "minimax_m2"])
def test_weights_decode_to_what_was_scored(kind, tmp_path):
    source = open_source(save_model(kind, tmp_path / "source"))
    groups = find_groups(source)
    assignment = mixed(groups)
    export(source, groups, assignment, input_amax(groups), tmp_path / "out")
    original, stored = load_tensors(source.path), load_tensors(tmp_path / "out")
    read_back = dict(open_quantized(tmp_path / "out").tensors())
    assert read_back.keys() == original.keys()
    for group in groups:
        choice = assignment[group.name]
        for linear in group.linears:
            weight = original[linear.tensor]
            if choice.format is BF16.format:
                assert torch.equal(read_back[linear.tensor], weight)
                continue
            peers = [n for n in group.linears if n.weight_scale_set == linear.weight_scale_set]
            amax = max(original[peer.tensor].abs().max().item() for peer in peers)
            if choice.format is FP8.format:
                scored = kernels.fake_quant_fp8(weight, kernels.fp8_scale(amax))
            else:
                scale = kernels.nvfp4_global_scale(amax, choice.scale_rule)
                scored = kernels.fake_quant_nvfp4_weight(weight, scale, rule=choice.scale_rule)
            assert torch.equal(read_back[linear.tensor], scored)
            assert torch.equal(decoded(stored, linear.name).bfloat16(), scored)


def test_input_scales_are_the_calibrated_magnitudes_over_the_largest_code(source, tmp_path):
    groups = find_groups(source)
    amax = input_amax(groups)
    assignment = mixed(groups)
    export(source, groups, assignment, amax, tmp_path / "out")
    scales = open_quantized(tmp_path / "out").input_scales
    for group in groups:
        largest = {NVFP4.format: 6 * 448, FP8.format: 448}.get(assignment[group.name].format)
        for linear in group.linears:
            if largest is None:
                assert linear.name not in scales
            else:
                value = torch.tensor(amax[linear.input_scale_set]) / torch.tensor(float(largest))
                assert scales[linear.name] == value.item()


def test_nothing_else_changes(tmp_path):
    folder = save_model("qwen2_moe", tmp_path / "source", shard_size="80KB")
    (folder / "tokenizer.json").write_text('{"a": "\u00fc"}', encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "code").mkdir()
    (folder / "code" / "modeling.py").write_text("x = 1\n")
    (folder / ".gitattributes").write_text("hidden")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    before = tree(folder)
    source = open_source(folder)
    result = export_mixed(source, tmp_path / "out")
    assert tree(folder) == before
    assert [str(path) for path in result.left_out] == ["pytorch_model.bin"]
    after = tree(tmp_path / "out")
    copied = {"tokenizer.json", "chat_template.jinja", "code/modeling.py", "generation_config.json"}
    assert {name: after[name] for name in copied} == {name: before[name] for name in copied}
    assert after.keys() - before.keys() == {"README.md", "autoquant.json", "hf_quant_config.json"}
    assert before.keys() - after.keys() == {".gitattributes", "pytorch_model.bin"}
    original, stored = load_tensors(folder), load_tensors(tmp_path / "out")
    for name, tensor in original.items():
        if stored[name].dtype == tensor.dtype:
            assert torch.equal(stored[name], tensor)


@pytest.mark.slow
def test_what_is_no_form_of_the_weights_comes_along_and_the_rest_is_named(tmp_path, autoquant):
    folder = save_searchable("llama", tmp_path / "source")
    shard = "model-00001-of-00001.safetensors"
    weights = load_tensors(folder)
    (folder / "model.safetensors").rename(folder / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"mtp.weight": torch.zeros(4)}, folder / "mtp.safetensors")
    companions = ("spk_dict.pt", "vocab.bin", "assets/lexicon.bin", "original/tokenizer.ckpt")
    others = (
        *("pytorch_model.bin", "model.pt", "original/consolidated.00.pth", "a.gguf"),
        *("onnx/decoder.onnx", "optimizer.pt", "large.pt"),
    )
    for name in (*companions, *others):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    os.truncate(folder / "large.pt", 2**28 + 1)
    assignment = tmp_path / "a.json"
    assignment.write_text(json.dumps({"schema_version": 1, "groups": {}}))
    out = tmp_path / "out"
    flags = ("--calibration", "stdlib", *TOKEN_FLAGS)
    done = autoquant("export", folder, "--assignment", assignment, "--out", out, *flags)
    assert done.exit_code == 0, done.stderr
    assert {name: (out / name).read_bytes() for name in companions} == {
        name: name.encode() for name in companions
    }
    assert not [name for name in (*others, "mtp.safetensors") if (out / name).exists()]
    assert [name for name in (*others, "mtp.safetensors") if name not in done.stderr] == []
    assert autoquant("verify", out, "--source", folder).exit_code == 0


def test_assignment_that_quantizes_nothing_gives_the_source_back(tmp_path):
    source = open_source(save_model("llama", tmp_path / "source", shard_size="60KB"))
    export(source, find_groups(source), Assignment.of({}), {}, tmp_path / "out")
    original, stored = load_tensors(source.path), load_tensors(tmp_path / "out")
    assert original.keys() == stored.keys()
    assert all(torch.equal(original[name], stored[name]) for name in original)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == source.config
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert verify(tmp_path / "out", source).ok


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_wider_sources_are_written_in_bf16_and_quantized_from_it(dtype, tmp_path):
    folder = save_model("llama", tmp_path / "source", dtype=dtype)
    source = open_source(folder)
    run(source, tmp_path / "out", NVFP4_MSE)
    assert verify(tmp_path / "out", source).problems == ()
    stored, original = load_tensors(tmp_path / "out"), load_tensors(folder)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert torch.equal(stored[name], original[name].bfloat16())
    weight = original["model.layers.0.mlp.down_proj.weight"].bfloat16()
    scale = kernels.nvfp4_global_scale(weight.abs().max(), "mse")
    codes, _ = kernels.quantize_nvfp4(weight, scale, rule="mse")
    assert torch.equal(stored["model.layers.0.mlp.down_proj.weight"], codes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_same_source_and_assignment_give_the_same_bytes(source, tmp_path):
    for name in ("one", "two"):
        export_mixed(source, tmp_path / name)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_all_zero_weight_is_stored_with_a_positive_scale(tmp_path):
    folder = save_model("llama", tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].zero_()
    save_file(weights, folder / "model.safetensors")
    source = open_source(folder)
    for choice in (NVFP4_MAX, FP8):
        target = tmp_path / choice.format.name
        run(source, target, choice)
        assert verify(target, source).problems == ()
        read_back = dict(open_quantized(target).tensors())
        assert not read_back["model.layers.0.mlp.down_proj.weight"].any()


def test_input_set_without_tokens_is_named_in_the_checkpoint(source, tmp_path):
    groups = find_groups(source)
    down = "model.layers.0.mlp.down_proj"
    fp8 = uniform(groups, FP8)
    unseen = {down, "model.layers.1.mlp.down_proj"}
    part = fp8.replace({"model.layers.1.mlp.down_proj": BF16})
    target = tmp_path / "out"
    result = export(source, groups, part, input_amax(groups), target, uncalibrated=unseen)
    assert result.uncalibrated == (down,)  # the other stores no scale
    said = json.loads((target / "autoquant.json").read_text())
    assert said["uncalibrated_inputs"] == [down]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_useless_input_magnitude(source, tmp_path, value):
    groups = find_groups(source)
    amax = input_amax(groups) | {"model.layers.0.mlp.gate_up": value}
    with pytest.raises(SourceError, match=r"input of model\.layers\.0\.mlp\.gate_up"):
        export(source, groups, uniform(groups, FP8), amax, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_input_set_without_a_magnitude(source, tmp_path):
    groups = find_groups(source)
    amax = input_amax(groups)
    del amax["model.layers.0.mlp.down_proj"]
    with pytest.raises(SourceError, match=r"layers\.0\.mlp\.down_proj was not calibrated"):
        export(source, groups, uniform(groups, FP8), amax, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_named_and_nothing_is_left(tmp_path, value):
    folder = save_model("llama", tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* NaN or Inf"):
        run(open_source(folder), tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_illegal_format(tmp_path):
    source = open_source(save_model("llama", tmp_path / "source", intermediate_size=72))
    with pytest.raises(ConfigError, match="divisible by 16, and K is 72"):
        run(source, tmp_path / "out")


def test_group_that_the_model_lacks(source, tmp_path):
    with pytest.raises(ConfigError, match="no layer group 'nonsense'"):
        export(source, find_groups(source), Assignment.of({"nonsense": FP8}), {}, tmp_path / "out")


def test_target_that_holds_something(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(RunConflict, match="exists and holds something") as caught:
        run(source, tmp_path / "out")
    assert caught.value.exit_code == 5
    assert tree(tmp_path / "out") == {"thesis.txt": b"precious"}


def test_target_that_is_a_file(source, tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(RunConflict):
        run(source, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"


def test_empty_target_and_missing_parents_are_fine(source, tmp_path):
    (tmp_path / "empty").mkdir()
    run(source, tmp_path / "empty")
    run(source, tmp_path / "a" / "b" / "c")
    assert verify(tmp_path / "empty").ok
    assert verify(tmp_path / "a" / "b" / "c").ok


@pytest.mark.parametrize("inside", [".", "out", ".."])
def test_target_that_shares_a_folder_with_the_source(source, inside):
    before = tree(source.path)
    with pytest.raises(ConfigError, match="would share a folder"):
        run(source, source.path / inside)
    assert tree(source.path) == before


def test_leftover_of_a_killed_export_is_replaced(source, tmp_path):
    unfinished = tmp_path / ".out.unfinished"
    unfinished.mkdir()
    (unfinished / ".autoquant-export").touch()
    (unfinished / "model.safetensors").write_bytes(b"half")
    run(source, tmp_path / "out")
    assert verify(tmp_path / "out", source).ok
    assert not unfinished.exists()
    assert not (tmp_path / "out" / ".autoquant-export").exists()


def test_temporary_name_that_is_not_ours_is_left_alone(source, tmp_path):
    unfinished = tmp_path / ".out.unfinished"
    unfinished.mkdir()
    (unfinished / "thesis.txt").write_text("precious")
    with pytest.raises(RunConflict, match="is not from AutoQuant"):
        run(source, tmp_path / "out")
    assert tree(unfinished) == {"thesis.txt": b"precious"}


def test_second_export_to_the_same_target_gives_way(source, tmp_path):
    unfinished = tmp_path / ".out.unfinished"
    unfinished.mkdir()
    with (
        FileLock(unfinished / ".autoquant-export"),
        pytest.raises(RunConflict, match="another export"),
    ):
        run(source, tmp_path / "out")
    assert unfinished.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interruption_leaves_nothing(source, tmp_path, error):
    def interrupt(count: int) -> None:
        raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        run(source, tmp_path / "out", on_bytes=interrupt)
    assert os.listdir(tmp_path) == ["source"]


def test_progress_adds_up_to_the_size_of_the_source(source, tmp_path):
    counts: list[int] = []
    run(source, tmp_path / "out", on_bytes=counts.append)
    assert sum(counts) == source.headers.bytes


def test_companion_that_links_elsewhere_is_refused(source, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (source.path / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="outside of the model"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("linked", ["elsewhere", "source/code"])
def test_folder_that_is_a_link_is_refused_and_not_lost(source, tmp_path, linked):
    folder = tmp_path / linked
    folder.mkdir()
    (folder / "modeling.py").write_text("x = 1\n")
    (source.path / "linked").symlink_to(folder)
    with pytest.raises(SourceError, match="is a link to the folder"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_index_is_written_last(tmp_path, monkeypatch):
    source = open_source(save_model("llama", tmp_path / "source", shard_size="80KB"))
    written: list[str] = []

    def record(path: Path, text: str) -> None:
        assert all((path.parent / file.name).exists() for file in source.headers.files)
        written.append(path.name)
        write_atomic(path, text)

    monkeypatch.setattr("autoquant.export.export.write_atomic", record)
    run(source, tmp_path / "out")
    assert written[-1] == "model.safetensors.index.json"
    assert sorted(written) == sorted(
        ["README.md", "autoquant.json", "config.json", "hf_quant_config.json", written[-1]]
    )


def front_matter(folder: Path) -> dict[str, object]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_card_of_a_hub_model_names_its_base_and_inherits_the_license(tmp_path):
    snapshot = tmp_path / "hub" / "models--some-org--tiny" / "snapshots" / "0123abc"
    save_model("llama", snapshot)
    (snapshot / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\nfoo: 1\n---\n# Tiny\n")
    facts = CardFacts(
        command="autoquant search some-org/tiny --budget-bpe 7",
        budget_bpe=7.0,
        target="blackwell",
        text="held-out prose",
        tokens=4096,
        rows=(
            KlRow(name="this checkpoint", bpe=6.9, kl=0.0123, stderr=0.0002),
            KlRow(name="uniform NVFP4", bpe=6.4, kl=0.0456, stderr=0.0009),
        ),
    )
    source = open_source(snapshot)
    groups = find_groups(source)
    export(source, groups, mixed(groups), input_amax(groups), tmp_path / "out", card=facts)
    assert front_matter(tmp_path / "out") == {
        "license": "mit",
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "base_model": "some-org/tiny",
        "base_model_relation": "quantized",
        "tags": ["autoquant", "mixed-precision", "nvfp4", "fp8"],
    }
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| this checkpoint | 6.900 | 1.230e-02 | 2.0e-04 |" in text
    assert "4,096 tokens of held-out prose" in text
    assert "    autoquant search some-org/tiny --budget-bpe 7" in text
    assert "| qkv | 2 | 0 | 0 |" in text
    assert "| 0 | nvfp4/mse | fp8 | bf16 | nvfp4/four_over_six |  |" in text
    said = json.loads((tmp_path / "out" / "autoquant.json").read_text())
    assert (said["base_model"], said["revision"]) == ("some-org/tiny", "0123abc")
    assert said["measured"]["kl"][0]["kl"] == 0.0123
    assert said["source_digest"] == source.digest


def test_card_of_a_folder_names_no_base_and_no_path(source, tmp_path):
    run(source, tmp_path / "out")
    assert "base_model" not in front_matter(tmp_path / "out")
    for name in ("README.md", "autoquant.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()


def test_compressed_tensors_unpacks_the_same_codes(source, tmp_path):
    module = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    run(source, tmp_path / "out")
    stored = load_tensors(tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"
    packed = stored[f"{name}.weight"]
    codes = module.unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1])
    step = stored[f"{name}.weight_scale"].float() * stored[f"{name}.weight_scale_2"]
    unpacked = codes.float() * step.repeat_interleave(16, dim=1)
    assert torch.equal(unpacked, decoded(stored, name))
