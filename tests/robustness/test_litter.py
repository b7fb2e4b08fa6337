"""What a kill leaves behind is known as ours, removed by the next command, and blocks nobody."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from filelock import FileLock

from autoquant.errors import RunConflict
from autoquant.export.target import new_folder
from autoquant.files import (
    MARK,
    clear_litter,
    is_litter,
    temporary,
    unfinished_folder,
    write_atomic,
)
from autoquant.store.run_directory import RunDirectory

SIGNATURE = {"seed": 0}


def ended_process() -> int:
    """Id of a process that there was."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.fixture(scope="module")
def ended():
    return ended_process()


def unfinished(folder: Path, *, marked: bool = True) -> Path:
    """What an export that was killed has left in `folder`."""
    left = unfinished_folder(folder / "checkpoint")
    (left / "checkpoint").mkdir(parents=True)
    (left / "checkpoint" / "model.safetensors").write_bytes(b"half")
    if marked:
        (left / MARK).touch()
    return left


@pytest.mark.parametrize("resume", [True, False], ids=["the same command", "--fresh"])
def test_a_kill_in_the_first_write_of_a_run_does_not_block_its_directory(tmp_path, resume):
    script = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from autoquant import files
        from autoquant.store.run_directory import RunDirectory
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        RunDirectory.open(Path(sys.argv[1]), {"seed": 0})
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=False)
    assert done.returncode == -signal.SIGKILL
    left = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert any(name.startswith(".run.json.") and name.endswith(".tmp") for name in left)
    with RunDirectory.open(tmp_path / "run", SIGNATURE, resume=resume) as run:
        names = {entry.name for entry in run.path.iterdir()}
    assert names == {".lock", "run.json"}


def test_every_kind_of_litter_is_removed_when_a_run_is_opened(tmp_path, ended):
    path = tmp_path / "run"
    (path / "interactions").mkdir(parents=True)
    for name in (
        f".run.json.{ended}.tmp",
        f".mlflow.db.{ended}.tmp",
        f".mlflow.db.{ended}.tmp-journal",
        f"interactions/.products-0.npy.{ended}.tmp",
    ):
        (path / name).write_text("half")
    (path / f".checkpoint.{ended}.tmp").mkdir()
    unfinished(path)
    unfinished_folder(path / "run").mkdir()
    (path / "interactions").rename(path / "mine")
    with pytest.raises(RunConflict, match="it holds 'mine'"):
        RunDirectory.open(path, SIGNATURE)
    assert unfinished_folder(path / "run").exists(), "what is refused is left as it is"
    (path / "mine").rename(tmp_path / "interactions")
    with RunDirectory.open(path, SIGNATURE):
        (tmp_path / "interactions").rename(path / "interactions")
    with RunDirectory.open(path, SIGNATURE):
        names = {str(entry.relative_to(path)) for entry in path.rglob("*")}
    assert names == {".lock", "run.json", "interactions"}


def test_another_search_may_take_a_directory_with_litter_of_one_that_measured_nothing(
    tmp_path, ended
):
    with RunDirectory.open(tmp_path / "run", SIGNATURE):
        pass
    (tmp_path / "run" / f".groups.json.{ended}.tmp").write_text("half")
    with RunDirectory.open(tmp_path / "run", {"seed": 1}) as run:
        assert run.signature == {"seed": 1}


def test_what_a_living_process_writes_stays_and_is_no_reason_to_refuse(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / f".report.html.{os.getppid()}.tmp").write_text("half")
    held = unfinished(path)
    with FileLock(held / MARK), RunDirectory.open(path, SIGNATURE):
        assert (held / "checkpoint" / "model.safetensors").read_bytes() == b"half"
        assert (path / f".report.html.{os.getppid()}.tmp").exists()


@pytest.mark.parametrize(
    "name", [".report.html.tmp", "report.html.1.tmp", ".a.1x.tmp", ".a.1.tmp.gz", ".unfinished"]
)
def test_names_that_only_look_alike_are_not_ours(tmp_path, name):
    (tmp_path / name).write_text("years of work")
    clear_litter(tmp_path)
    assert not is_litter(tmp_path / name)
    assert (tmp_path / name).read_text() == "years of work"


def test_an_unfinished_folder_without_our_mark_is_not_ours(tmp_path):
    left = unfinished(tmp_path, marked=False)
    clear_litter(tmp_path)
    assert (left / "checkpoint" / "model.safetensors").exists()
    with (
        pytest.raises(RunConflict, match="exists and is not from AutoQuant"),
        new_folder(tmp_path / "checkpoint", source=tmp_path / "source"),
    ):
        pass


def test_an_export_removes_what_one_that_was_killed_at_its_end_has_left(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    (unfinished_folder(tmp_path / "checkpoint")).mkdir()
    (unfinished_folder(tmp_path / "checkpoint") / MARK).touch()
    with (
        pytest.raises(RunConflict, match="exists and holds something"),
        new_folder(tmp_path / "checkpoint", source=tmp_path / "source"),
    ):
        pass
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_file_that_is_written_again_leaves_nothing_of_a_killed_attempt(tmp_path, ended):
    (tmp_path / f".report.html.{ended}.tmp").write_text("half")
    (tmp_path / f".other.html.{ended}.tmp").write_text("half")
    write_atomic(tmp_path / "report.html", "whole")
    assert sorted(os.listdir(tmp_path)) == [f".other.html.{ended}.tmp", "report.html"]


def test_names_for_unfinished_work_are_recognized(tmp_path):
    for name in ("run.json", "größe 1.2.tmp", "a\nb"):
        assert is_litter(temporary(tmp_path / name))


def test_json_holds_names_of_files_that_are_not_utf8():
    from autoquant.files import to_json

    name = os.fsdecode(b"run-\xff")
    assert json.loads(to_json({"path": name}).encode()) == {"path": name}
