"""The identity of a model: every byte of its weights, read no more often than needed."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_model

from autoquant.errors import SourceError
from autoquant.source import contents
from autoquant.source.headers import TensorHeader
from autoquant.source.source import Source, open_source

PAST = 1_700_000_000_000_000_000
"""A modification time, nanoseconds, that lies far back."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model of three weight files that have not changed for long."""
    return settled(save_model("llama", tmp_path / "model", shard_size="60KB"))


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files that have been read whole."""
    names: list[str] = []
    plain = contents.sha256

    def watched(file, step=None):
        names.append(file.name)
        return plain(file, step)

    monkeypatch.setattr(contents, "sha256", watched)
    return names


def settled(folder: Path, time: int = PAST) -> Path:
    for file in weights(folder):
        os.utime(file, ns=(time, time))
    return folder


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def zero(tensor: TensorHeader) -> None:
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.begin)
        stream.write(bytes(tensor.end - tensor.begin))


def test_a_digest_is_that_of_sha256sum(folder):
    for file in weights(folder):
        assert contents.sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("shard_size", ["60KB", "1GB"])
def test_zeroing_any_one_tensor_makes_another_model(tmp_path, shard_size):
    folder = save_model("llama", tmp_path / "model", shard_size=shard_size)
    source = open_source(folder)
    digests = {source.digest}
    for tensor in source.headers:
        original = tensor.file.read_bytes()
        zero(tensor)
        digests.add(open_source(folder).digest)
        tensor.file.write_bytes(original)
    assert len(digests) == 1 + len(source.headers)
    assert open_source(folder).digest == source.digest


def test_every_file_is_read_once_and_again_only_when_its_time_changes(folder, read):
    names = [file.name for file in weights(folder)]
    digest = open_source(folder).digest
    assert read == names
    assert open_source(folder).digest == digest
    assert read == names
    os.utime(folder / names[1], ns=(PAST, PAST + 1))
    assert open_source(folder).digest == digest
    assert read == [*names, names[1]]


def test_a_change_that_shows_in_the_time_alone_is_seen(folder):
    source = open_source(folder)
    digest = source.digest
    zero(source.headers["model.norm.weight"])
    settled(folder, PAST + 1)
    assert open_source(folder).digest != digest


def test_a_file_that_takes_the_place_of_one_of_its_size_and_time_is_seen(folder, tmp_path):
    digest = open_source(folder).digest
    file = weights(folder)[0]
    tensors = {name: torch.zeros_like(value) for name, value in load_file(file).items()}
    save_file(tensors, tmp_path / "zeros.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "zeros.safetensors").stat().st_size == file.stat().st_size
    (tmp_path / "zeros.safetensors").replace(file)
    settled(folder)
    assert open_source(folder).digest != digest


def test_a_file_that_has_just_changed_is_not_relied_on(folder):
    """A second change may fall into the same step of the clock."""
    source = open_source(folder)
    tensor = source.headers["model.norm.weight"]
    os.utime(tensor.file)
    time = tensor.file.stat().st_mtime_ns
    digest = source.digest
    zero(tensor)
    os.utime(tensor.file, ns=(time, time))
    assert open_source(folder).digest != digest


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"sha256": "' + b"0" * 64 + b'"}',
    ],
)
def test_a_damaged_cache_is_ignored_and_mended(folder, cache, read, damage):
    digest = open_source(folder).digest
    entries = sorted((cache / "contents").iterdir())
    assert len(entries) == len(weights(folder))
    entries[0].write_bytes(damage)
    assert open_source(folder).digest == digest
    assert len(read) == len(entries) + 1
    assert open_source(folder).digest == digest
    assert len(read) == len(entries) + 1


@pytest.mark.parametrize("value", ["0" * 63, "Z" * 64, 7, None])
def test_a_remembered_digest_that_is_none_is_ignored(folder, cache, value):
    digest = open_source(folder).digest
    for entry in (cache / "contents").iterdir():
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"sha256": value}))
    assert open_source(folder).digest == digest


def test_without_a_cache_files_are_read_each_time(folder, read, tmp_path, monkeypatch):
    digest = open_source(folder).digest
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "file" / "cache"))
    assert open_source(folder).digest == digest
    assert len(read) == 2 * len(weights(folder))


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert contents.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("AUTOQUANT_CACHE")
    assert contents.cache_folder() == tmp_path / "user" / "autoquant"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert contents.cache_folder() == tmp_path / "home" / ".cache" / "autoquant"


@pytest.fixture
def snapshot(folder, tmp_path) -> Source:
    """The model as the hub's cache holds it: links to blobs that are named after their content."""
    entry = tmp_path / "hub" / "models--some-org--tiny"
    snapshot = entry / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        is_large = file.suffix == ".safetensors"
        blob = hashlib.sha256(file.read_bytes()).hexdigest() if is_large else f"{number:040x}"
        shutil.copy2(file, entry / "blobs" / blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob)
    return open_source(snapshot)


def test_blobs_of_the_hub_need_no_reading(snapshot, folder, read):
    digest = snapshot.digest
    assert read == []
    assert digest == open_source(folder).digest


def test_a_blob_that_was_edited_in_place_is_read(snapshot, read):
    digest, tensor = snapshot.digest, snapshot.headers["model.norm.weight"]
    zero(tensor)
    linked = tensor.file.lstat().st_mtime_ns
    os.utime(tensor.file, ns=(linked, linked + 1))
    assert open_source(snapshot.path).digest != digest
    assert read == [tensor.file.name]


class Watching:
    """A `Progress` that keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, str]] = []
        self.steps = 0

    def stage(self, name, steps, unit):
        self.stages.append((name, steps, str(unit)))

    def step(self, count):
        self.steps += count


def test_what_there_is_to_read_is_told_in_bytes(folder, monkeypatch):
    monkeypatch.setattr(contents, "_TOLD_BYTES", 1)
    monkeypatch.setattr(contents, "_BLOCK_BYTES", 1000)
    size, watching = sum(file.stat().st_size for file in weights(folder)), Watching()
    open_source(folder).contents.digests(watching)
    assert (watching.stages, watching.steps) == ([("hash", size, "bytes")], size)
    again = Watching()
    open_source(folder).contents.digests(again)
    assert (again.stages, again.steps) == ([], 0)


def test_little_to_read_is_no_stage(folder):
    watching = Watching()
    open_source(folder).contents.digests(watching)
    assert (watching.stages, watching.steps) == ([], 0)


def test_a_file_that_changes_while_it_is_read(folder, monkeypatch):
    plain = contents.sha256

    def sha256(file, step=None):
        digest = plain(file, step)
        os.utime(file)
        return digest

    monkeypatch.setattr(contents, "sha256", sha256)
    with pytest.raises(SourceError, match="has changed while it was read") as caught:
        open_source(folder).digest  # noqa: B018
    assert "whatever writes it" in caught.value.fix


def test_a_file_that_is_gone(folder):
    source = open_source(folder)
    weights(folder)[1].unlink()
    with pytest.raises(SourceError, match=r"00002-of-00003\.safetensors cannot be read"):
        source.digest  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "code"), [(("plan",), 0), (("search", "--budget-bpe", 0.5, "--no-mlflow"), 3)]
)
def test_plans_and_budgets_that_cannot_be_kept_read_no_weights(
    folder, autoquant, monkeypatch, arguments, code
):
    def refuse(*_):
        raise AssertionError("a weight file is read")

    monkeypatch.setattr(contents, "sha256", refuse)
    done = autoquant(*arguments, folder)
    assert done.exit_code == code, done.stderr
