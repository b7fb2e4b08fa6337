"""Damaged sources and impossible targets, as the command line meets them.

Each ends with its own message and exit code, writes nothing, and leaves the source as it was.
"""

import json
import os
import shutil
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from exported import input_amax, load_tensors, mixed, tree
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import save_model

from autoquant.errors import ConfigError
from autoquant.export.verify import verify
from autoquant.files import to_json
from autoquant.formats import BF16, FP8, NVFP4, PLAIN_RULES, Choice
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

INDEX = "model.safetensors.index.json"
CHOICES = (BF16, FP8, *(Choice(NVFP4.format, rule) for rule in PLAIN_RULES))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A source in shards with an assignment and input ranges beside it, which no test changes."""
    folder = tmp_path_factory.mktemp("sound")
    source = open_source(save_model("qwen2", folder / "model", shard_size="60KB"))
    assert len(source.headers.files) > 2
    groups = find_groups(source)
    (folder / "assignment.yaml").write_text(yaml.safe_dump(mixed(groups).to_dict()))
    ranges = {"schema_version": 1, "input_amax": input_amax(groups)}
    (folder / "calibration.json").write_text(to_json(ranges))
    return folder


@pytest.fixture
def exported(sound, autoquant):
    """Export a model with the assignment and the ranges of the sound one."""

    def call(model: Path, target: Path):
        return autoquant(
            *("export", model, "--assignment", sound / "assignment.yaml"),
            *("--calibrated", sound / "calibration.json", "--out", target),
        )

    return call


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def rewrite(file: Path, change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def shard_with(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def truncate(folder):
    file = first_shard(folder)
    os.truncate(file, file.stat().st_size - 1)


def lose_a_shard(folder):
    first_shard(folder).unlink()


def double_a_shard(folder):
    first, last = min(folder.glob("*.safetensors")), max(folder.glob("*.safetensors"))
    shutil.copy(first, last)


def swap_files_in_the_index(folder):
    def swap(places):
        names = sorted(set(places.values()))
        other = dict(zip(names, reversed(names), strict=True))
        places |= {tensor: other[file] for tensor, file in places.items()}

    change_index(folder, swap)


def promise_an_absurd_header(folder):
    file = first_shard(folder)
    content = bytearray(file.read_bytes())
    content[:8] = struct.pack("<Q", 2**60)
    file.write_bytes(content)


def promise_an_absurd_tensor(folder):
    file = first_shard(folder)
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"] = [2**40, 2**40]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def poison(value):
    def change(folder):
        rewrite(shard_with(folder, Q_PROJ), lambda t: t[Q_PROJ].view(-1)[3:4].fill_(value))

    return change


def change_a_width(folder):
    rewrite(shard_with(folder, Q_PROJ), lambda t: t.update({Q_PROJ: t[Q_PROJ][:, :48].clone()}))


def link_elsewhere(folder):
    file = first_shard(folder)
    moved = folder.parent / "elsewhere.safetensors"
    file.rename(moved)
    file.symlink_to(moved)


def name_a_file_above(folder):
    change_index(folder, lambda p: p.update({Q_PROJ: "../model/" + first_shard(folder).name}))


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (truncate, 4, "is truncated"),
        (lose_a_shard, 4, "is missing"),
        (double_a_shard, 4, "a tensor is stored once"),
        (swap_files_in_the_index, 4, "and it is in"),
        (promise_an_absurd_header, 4, "promises a header of 1,152,921,504,606,846,976 bytes"),
        (promise_an_absurd_tensor, 4, "more than 2^64 bytes, [1099511627776, 1099511627776]"),
        (poison(float("nan")), 4, f"{Q_PROJ} in "),
        (poison(float("inf")), 4, "holds NaN or Inf"),
        (change_a_width, 4, "share an input"),
        (link_elsewhere, 4, "lies outside of the folder"),
        (name_a_file_above, 4, "lies outside of the folder"),
    ],
)
def test_a_damaged_source_is_named_and_left_alone(sound, exported, tmp_path, damage, code, message):
    model = tmp_path / "model"
    shutil.copytree(sound / "model", model)
    damage(model)
    before = tree(tmp_path)
    done = exported(model, tmp_path / "out")
    assert done.exit_code == code, done.stderr
    assert message in done.stderr
    assert "  fix: " in done.stderr
    assert done.stdout == ""
    assert tree(tmp_path) == before


def test_tensor_names_are_no_paths(sound, exported, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(sound / "model", model)
    file, name = first_shard(model), "../../evil/.weight"
    rewrite(file, lambda t: t.update({name: torch.ones(3)}))
    change_index(model, lambda places: places.update({name: file.name}))
    done = exported(model, tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]
    assert not (tmp_path.parent / "evil").exists()
    assert torch.equal(load_tensors(tmp_path / "out")[name], torch.ones(3))
    assert verify(tmp_path / "out", open_source(model)).ok


def test_a_target_that_cannot_be_written_is_said_at_once(sound, exported):
    if not Path("/proc/self").exists():
        pytest.skip("no /proc, whose folders nobody may write")
    done = exported(sound / "model", Path("/proc/self/out"))
    assert done.exit_code == 2
    assert "/proc/self/out cannot be written" in done.stderr


def test_another_checkpoint_in_the_way_stays(sound, exported, tmp_path):
    assert exported(sound / "model", tmp_path / "out").exit_code == 0
    before = tree(tmp_path)
    done = exported(sound / "model", tmp_path / "out")
    assert done.exit_code == 5
    assert "exists and holds something" in done.stderr
    assert tree(tmp_path) == before


def test_ranges_of_another_model_are_refused(sound, autoquant, tmp_path):
    (tmp_path / "calibration.json").write_text('{"schema_version": 1, "input_amax": {"a": 1.0}}')
    done = autoquant(
        *("export", sound / "model", "--assignment", sound / "assignment.yaml"),
        *("--calibrated", tmp_path / "calibration.json", "--out", tmp_path / "out"),
    )
    assert done.exit_code == 4
    assert "has no input range for model.layers.0." in done.stderr
    assert os.listdir(tmp_path) == ["calibration.json"]


@given(st.dictionaries(st.text(), st.sampled_from(CHOICES)))
def test_assignments_are_read_back_from_yaml_and_json(choices):
    assignment = Assignment.of(choices)
    text = yaml.safe_dump(assignment.to_dict(), sort_keys=False)
    assert Assignment.from_dict(yaml.safe_load(text)) == assignment
    assert Assignment.from_dict(json.loads(to_json(assignment.to_dict()))) == assignment
    assert Assignment.of(dict(reversed(choices.items()))).digest == assignment.digest


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(
    JSON_VALUES
    | st.fixed_dictionaries(
        {"schema_version": st.just(1) | JSON_VALUES, "groups": JSON_VALUES},
        optional={"more": JSON_VALUES},
    )
)
def test_anything_else_is_no_assignment(data):
    with suppress(ConfigError):
        read = Assignment.from_dict(data)
        assert Assignment.from_dict(read.to_dict()) == read
