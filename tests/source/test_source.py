"""Opening a model, and every way in which it can be incomplete."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import change_tensors, save_model

from autoquant.errors import SourceError
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source
from autoquant.source.tensors import read_tensor


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_model("llama", tmp_path / "model")


@pytest.fixture
def sharded(tmp_path) -> Path:
    return save_model("llama", tmp_path / "sharded", shard_size="60KB")


def index_of(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def change_index(folder: Path, tensor: str, file: str | None) -> None:
    index = json.loads(index_of(folder).read_text())
    if file is None:
        del index["weight_map"][tensor]
    else:
        index["weight_map"][tensor] = file
    index_of(folder).write_text(json.dumps(index))


def fails(model: object, message: str) -> str:
    with pytest.raises(SourceError, match=message) as caught:
        open_source(model)
    assert caught.value.exit_code == 4
    return caught.value.fix


def test_one_file_and_shards_hold_the_same_tensors(folder, sharded):
    one, many = open_source(folder), open_source(str(sharded))
    assert len(many.headers.files) > 1
    assert {t.name: t.shape for t in one.headers} == {t.name: t.shape for t in many.headers}
    assert one.headers.elements == sum(t.numel() for t in load_file(one.headers.files[0]).values())
    assert one.headers.bytes == 2 * one.headers.elements
    assert (one.revision, one.hub_id) == (None, None)


def test_digest_tells_weights_and_configs_apart_and_stays_otherwise(folder, tmp_path):
    digest = open_source(folder).digest
    assert open_source(shutil.copytree(folder, tmp_path / "copy")).digest == digest
    assert open_source(save_model("llama", tmp_path / "other", seed=1)).digest != digest
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert open_source(folder).digest != digest


def test_snapshot_in_the_hub_cache_is_followed_into_its_blobs(folder, tmp_path):
    entry = tmp_path / "hub" / "models--some-org--tiny"
    snapshot = entry / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, entry / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    source = open_source(snapshot)
    assert (source.revision, source.hub_id) == ("0123abc", "some-org/tiny")
    assert source.digest == open_source(folder).digest


def test_a_link_to_a_snapshot_is_the_snapshot(folder, tmp_path, autoquant):
    entry = tmp_path / "hub" / "models--some-org--tiny"
    snapshot = entry / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, entry / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    (tmp_path / "linked").symlink_to(snapshot)
    (tmp_path / "models").symlink_to(snapshot.parent)
    for path in (tmp_path / "linked", tmp_path / "models" / "0123abc"):
        source = open_source(path)
        assert (source.revision, source.hub_id) == ("0123abc", "some-org/tiny")
        assert source.digest == open_source(folder).digest
        assert autoquant("plan", path).exit_code == 0


def test_hub_id_is_found_in_the_cache_while_offline(folder, tmp_path, monkeypatch):
    entry = tmp_path / "hub" / "models--some-org--tiny"
    shutil.copytree(folder, entry / "snapshots" / "0123abc")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    source = open_source("some-org/tiny")
    assert (source.model, source.hub_id) == ("some-org/tiny", "some-org/tiny")


def test_a_revision_of_a_hub_model_is_the_one_opened(
    folder, sharded, tmp_path, monkeypatch, autoquant
):
    commit = "4567def" + 33 * "0"
    entry = tmp_path / "hub" / "models--some-org--tiny"
    shutil.copytree(folder, entry / "snapshots" / "0123abc")
    shutil.copytree(sharded, entry / "snapshots" / commit)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0123abc")
    (entry / "refs" / "v2").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert open_source("some-org/tiny").revision == "0123abc"
    for name in ("v2", commit):
        assert open_source("some-org/tiny", revision=name).revision == commit
        assert autoquant("plan", "some-org/tiny", "--revision", name).exit_code == 0
    missing = autoquant("plan", "some-org/tiny", "--revision", "v3")
    assert missing.exit_code == 4
    assert "some-org/tiny" in missing.stderr


def test_a_folder_has_no_revision(folder, autoquant):
    done = autoquant("plan", folder, "--revision", "main")
    assert done.exit_code == 2
    assert f"revision main was asked for, and {folder} is a folder" in done.stderr


def test_unknown_hub_id_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "HF_HUB_OFFLINE" in fails("some-org/no-such-model", "'some-org/no-such-model' is not a")


def test_name_that_is_neither_folder_nor_id():
    fails("a b//c", "neither a folder nor a hub id")


@pytest.mark.parametrize("missing", ["./nowhere", Path("nowhere"), "/no/where"])
def test_folder_that_does_not_exist(missing):
    fails(missing, "does not exist")


def test_file_in_place_of_a_folder(folder):
    fails(folder / "model.safetensors", "is a file")


def test_no_config(folder):
    (folder / "config.json").unlink()
    fails(folder, r"holds no config\.json")


def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    fails(folder, r"config\.json is not JSON")


def test_config_that_is_not_an_object(folder):
    (folder / "config.json").write_text("[]")
    fails(folder, "not a JSON object")


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    fails(sharded, r"model-00002-of-00003\.safetensors is missing")


def test_shard_that_the_index_does_not_name(sharded):
    index = json.loads(index_of(sharded).read_text())
    last = "model-00003-of-00003.safetensors"
    index["weight_map"] = {t: f for t, f in index["weight_map"].items() if f != last}
    index_of(sharded).write_text(json.dumps(index))
    fails(sharded, f"{last} is a shard of this checkpoint that")


def test_shards_without_an_index(sharded):
    index_of(sharded).unlink()
    fails(sharded, "and no model.safetensors.index.json")


def test_index_that_places_a_tensor_in_another_file(sharded):
    change_index(sharded, "model.norm.weight", "model-00001-of-00003.safetensors")
    fails(sharded, r"places model\.norm\.weight in .*, and it is in model-0000")


def test_index_that_names_a_tensor_no_file_has(sharded):
    change_index(sharded, "model.ghost.weight", "model-00001-of-00003.safetensors")
    fails(sharded, "and it is in no file")


def test_index_that_lacks_a_tensor(sharded):
    change_index(sharded, "model.norm.weight", None)
    fails(sharded, r"holds model\.norm\.weight, which .* does not name")


@pytest.mark.parametrize("outside", ["../x.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_that_names_a_file_elsewhere(sharded, outside):
    change_index(sharded, "model.norm.weight", outside)
    fails(sharded, "lies outside of the folder")


@pytest.mark.parametrize("value", [1, None, ["a"]])
def test_index_that_maps_to_no_file_name(sharded, value):
    index = json.loads(index_of(sharded).read_text())
    index["weight_map"]["model.norm.weight"] = value
    index_of(sharded).write_text(json.dumps(index))
    fails(sharded, "which is not a file name")


def test_index_without_weight_map(sharded):
    index_of(sharded).write_text("{}")
    fails(sharded, "has no weight_map")


def test_link_that_leaves_the_folder(folder, tmp_path):
    weights = folder / "model.safetensors"
    shutil.move(weights, tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    fails(folder, "lies outside of the folder")


def test_leftover_index_beside_a_single_file(sharded):
    save_file({"a": torch.ones(1)}, sharded / "model.safetensors")
    fails(sharded, "which of the two is meant")


def test_pickled_weights_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "save_pretrained" in fails(folder, "pickled weights are not read")


def test_adapter(folder):
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    fails(folder, "holds an adapter and no model")


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    fails(folder, "holds neither model.safetensors nor")


def test_already_quantized(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config))
    fails(folder, r"already quantized \(quantization_config: awq\)")


def test_block_scales_that_the_config_does_not_declare(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, folder / "model.safetensors")
    fails(folder, r"stores block scales, and its config\.json declares no quant_method fp8")


@pytest.fixture
def on_the_hub(sharded, tmp_path, monkeypatch):
    """`some-org/tiny` on a hub that hands out small files and headers, and no weight."""
    from huggingface_hub.utils import (
        SafetensorsFileMetadata,
        SafetensorsRepoMetadata,
        TensorInfo,
    )

    from autoquant.source.headers import read_file_header

    snapshot = tmp_path / "hub" / "models--some-org--tiny" / "snapshots" / "0123abc"

    def snapshot_download(model, *, allow_patterns, **_):
        snapshot.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            shutil.copy(sharded / name, snapshot / name)
        return str(snapshot)

    def get_safetensors_metadata(self, model, *, revision):
        assert revision == "0123abc"
        files = {}
        for file in sorted(sharded.glob("*.safetensors")):
            entries, metadata = read_file_header(file)
            base = min(entry.begin for entry in entries)
            infos = {
                e.name: TensorInfo(e.dtype, list(e.shape), (e.begin - base, e.end - base))
                for e in entries
            }
            files[file.name] = SafetensorsFileMetadata(metadata=metadata, tensors=infos)
        return SafetensorsRepoMetadata(
            metadata={}, sharded=True, weight_map={}, files_metadata=files
        )

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi.get_safetensors_metadata", get_safetensors_metadata)
    return snapshot


def test_headers_of_a_hub_model_are_read_without_its_weights(on_the_hub, sharded):
    remote, local = open_source("some-org/tiny", weights=False), open_source(sharded)
    assert not list(on_the_hub.glob("*.safetensors"))
    assert {t.name: (t.dtype, t.shape, t.bytes) for t in remote.headers} == {
        t.name: (t.dtype, t.shape, t.bytes) for t in local.headers
    }
    assert (remote.revision, remote.hub_id) == ("0123abc", "some-org/tiny")


def test_hub_model_without_safetensors(on_the_hub, monkeypatch):
    from huggingface_hub.errors import NotASafetensorsRepoError

    def refuse(self, model, *, revision):
        raise NotASafetensorsRepoError("no model.safetensors")

    monkeypatch.setattr("huggingface_hub.HfApi.get_safetensors_metadata", refuse)
    with pytest.raises(SourceError, match="has no safetensors weights"):
        open_source("some-org/tiny", weights=False)


WIDE = {"float32": torch.float32, "float16": torch.float16, "float64": torch.float64}


@pytest.mark.parametrize("dtype", WIDE)
def test_a_wider_model_is_read_in_bf16_and_its_config_says_so(tmp_path, dtype):
    folder = save_model("llama", tmp_path / "model", dtype=dtype)
    source = open_source(folder)
    assert {tensor.dtype for tensor in source.headers} == {"BF16"}
    assert source.config["dtype"] == "bfloat16"
    assert source.headers.bytes == 2 * source.headers.elements
    name = "model.layers.1.mlp.up_proj.weight"
    stored = load_file(folder / "model.safetensors")[name]
    assert stored.dtype == WIDE[dtype]
    assert torch.equal(read_tensor(source.headers[name]), stored.bfloat16())


def test_tensors_that_engines_keep_wide_stay_so_in_a_float32_model(tmp_path):
    folder = save_model("qwen3_next", tmp_path / "model", dtype="float32")
    dtypes = {
        tensor.name.rpartition(".")[2]: tensor.dtype for tensor in open_source(folder).headers
    }
    assert (dtypes["A_log"], dtypes["dt_bias"], dtypes["weight"]) == ("F32", "F32", "BF16")


def test_a_bf16_model_keeps_what_it_stores_wider_but_for_linears(folder):
    def widen(tensors):
        for name in ("model.norm.weight", "model.layers.0.mlp.down_proj.weight"):
            tensors[name] = tensors[name].float()
        tensors["model.layers.0.mlp.router.proj.weight"] = torch.ones(4, 64)

    change_tensors(folder, widen)
    source = open_source(folder)
    assert source.headers["model.norm.weight"].dtype == "F32"
    assert source.headers["model.layers.0.mlp.router.proj.weight"].dtype == "F32"
    assert source.headers["model.layers.0.mlp.down_proj.weight"].dtype == "BF16"


def head_of(folder):
    return {group.name for group in find_groups(open_source(folder)) if group.role == "head"}


@pytest.mark.parametrize("says", [True, None], ids=["the config", "the class"])
def test_a_head_is_tied_by_its_tensors_whatever_says_otherwise(tmp_path, says):
    folder = save_model("gemma2", tmp_path / "model", tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(
        json.dumps(config if says is None else config | {"tie_word_embeddings": says})
    )
    assert head_of(folder) == {"lm_head"}
    assert open_source(folder).config["tie_word_embeddings"] is False
    change_tensors(
        folder,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        ),
    )
    assert head_of(folder) == set()
    assert open_source(folder).config.get("tie_word_embeddings") is says
