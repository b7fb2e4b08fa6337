"""Kills, damage and full disks: what is there is whole, and the same command goes on."""

import json
import os
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from exported import change_tensors, export_mixed, input_amax, mixed, tree
from searchable import TOKEN_FLAGS, save_searchable, save_text
from tiny_models import save_model

from autoquant.export.verify import verify
from autoquant.files import write_atomic
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source
from autoquant.store.run_directory import RunDirectory

pytestmark = pytest.mark.slow

CHANGES_OF_FOLDERS = {"open", "os.mkdir", "os.rmdir", "os.rename", "os.remove", "os.truncate"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(save_model("qwen2", tmp_path_factory.mktemp("source"), shard_size="100KB"))


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Arguments of a finished search and its run directory, which no test changes."""
    from click.testing import CliRunner

    from autoquant.cli import cli

    folder = tmp_path_factory.mktemp("searched")
    arguments = [
        *("search", save_searchable("qwen2", folder / "model"), "--budget-bpe", 9),
        *("--calibration", save_text(folder / "text"), *TOKEN_FLAGS, "--trials", 0, "--no-mlflow"),
    ]
    done = CliRunner().invoke(cli, [str(a) for a in [*arguments, "--out", folder / "run"]])
    assert done.exit_code == 0, done.stderr
    return arguments, folder / "run"


@pytest.fixture
def again(searched, autoquant, tmp_path):
    """The same search once more, on a copy of its run directory."""
    arguments, finished = searched
    shutil.copytree(finished, tmp_path / "run")

    def call():
        return autoquant(*arguments, "--out", tmp_path / "run"), tmp_path / "run"

    return call


def in_child(work) -> int:
    """Call `work` in a fork of this process; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def files_of_at_most(size: int):
    """Let the system refuse longer files to this process, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def die_at(step: int, folder: Path) -> None:
    """Let this process be killed when it changes something below `folder` for the nth time."""
    left = step

    def count(event, arguments):
        nonlocal left
        if event in CHANGES_OF_FOLDERS and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


@pytest.mark.slow
def test_an_export_killed_at_any_change_of_a_folder_is_absent_or_whole_and_can_be_made(
    source, tmp_path
):
    before = tree(source.path)
    step, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()

        def killed(step=step, folder=folder):
            die_at(step, folder)
            export_mixed(source, folder / "out")

        code = in_child(killed)
        if not (folder / "out").exists() or not os.listdir(folder / "out"):
            export_mixed(source, folder / "out")
            assert os.listdir(folder) == ["out"]
        assert verify(folder / "out", source).ok, step
        shutil.rmtree(folder)
    assert code == 0
    assert step > 20, "the kills reached every stage of the export"
    assert tree(source.path) == before


def test_a_file_that_may_not_grow_ends_an_export_and_leaves_nothing(source, tmp_path, autoquant):
    groups = find_groups(source)
    write_atomic(tmp_path / "assignment.yaml", json.dumps(mixed(groups).to_dict()))
    ranges = {"schema_version": 1, "input_amax": input_amax(groups)}
    write_atomic(tmp_path / "calibration.json", json.dumps(ranges))
    before = tree(source.path)
    arguments = [
        *("export", source.path, "--assignment", tmp_path / "assignment.yaml"),
        *("--calibrated", tmp_path / "calibration.json", "--out", tmp_path / "out"),
    ]
    with files_of_at_most(20_000):
        done = autoquant(*arguments)
    assert done.exit_code == 4
    assert "error: the disk is full or lets no file grow further: " in done.stderr
    assert "fix: free space" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["assignment.yaml", "calibration.json"]
    assert tree(source.path) == before
    assert autoquant(*arguments).exit_code == 0
    assert verify(tmp_path / "out", source).ok


def test_a_search_that_ran_out_of_room_goes_on_when_there_is_some(searched, autoquant, tmp_path):
    arguments, finished = searched
    with files_of_at_most(20_000):
        stopped = autoquant(*arguments, "--out", tmp_path / "run")
    assert stopped.exit_code == 4
    assert "a search goes on where it stopped" in stopped.stderr
    assert not (tmp_path / "run" / "result.json").exists()
    kept = (tmp_path / "run" / "calibration.json").read_bytes()
    done = autoquant(*arguments, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "run" / "calibration.json").read_bytes() == kept
    results = [
        json.loads((run / "result.json").read_text()) for run in (tmp_path / "run", finished)
    ]
    assert results[0]["kl"] == results[1]["kl"]
    assert tree(tmp_path / "run" / "checkpoint").keys() == tree(finished / "checkpoint").keys()


@pytest.mark.parametrize("text", ["{", '{"schema_version": 1, "load": "soon"}'])
def test_damaged_times_are_no_reason_to_begin_anew(again, tmp_path, text):
    (tmp_path / "run" / "seconds.json").write_text(text)
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    done, run = again()
    assert done.exit_code == 0, done.stderr
    assert "seconds.json is damaged" in done.stderr
    assert verify(run / "checkpoint").ok


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json", "a tensor"])
def test_a_finished_search_whose_checkpoint_was_damaged_exports_it_again(again, tmp_path, lost):
    checkpoint = tmp_path / "run" / "checkpoint"
    expected = tree(checkpoint)
    if lost == "a tensor":
        change_tensors(checkpoint, lambda tensors: tensors.pop("model.norm.weight"))
    else:
        (checkpoint / lost).unlink()
    (checkpoint / "notes.txt").write_text("mine")
    done, run = again()
    assert done.exit_code == 0, done.stderr
    assert "exported again" in done.stderr
    # The model card and autoquant.json name the command that exported it.
    named = {"README.md", "autoquant.json"}
    found = tree(run / "checkpoint")
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in found.keys() - named)
    [aside] = run.glob("checkpoint.*")
    assert (aside / "notes.txt").read_text() == "mine"


def test_a_start_that_failed_before_it_measured_binds_no_run_directory(
    searched, autoquant, tmp_path
):
    arguments, _ = searched
    (tmp_path / "short.txt").write_text("too short")
    flags = ["--calibration", tmp_path / "short.txt", "--out", tmp_path / "run"]
    failed = autoquant(*arguments, *flags)
    assert failed.exit_code == 4
    assert "leaves no sequence" in failed.stderr
    done = autoquant(*arguments, "--no-export", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    assert "short.txt" not in (tmp_path / "run" / "config.resolved.yaml").read_text()
    other = autoquant(*arguments, *flags)
    assert other.exit_code == 5
    assert "belongs to another search" in other.stderr


def test_a_refused_folder_is_not_even_given_a_lock(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(Exception, match="no run directory"):
        RunDirectory.open(tmp_path, {"seed": 0})
    assert tree(tmp_path) == {"thesis.tex": b"years of work"}


def test_one_flipped_bit_is_found_without_the_source(source, tmp_path):
    export_mixed(source, tmp_path / "out")
    file = max((tmp_path / "out").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    [problem] = verify(tmp_path / "out").problems
    assert problem.startswith(f"{file.name} has changed since it was exported: its SHA-256 is")
