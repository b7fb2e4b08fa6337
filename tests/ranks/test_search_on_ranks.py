"""Processes that share a search end as one process does, and none waits for one that is gone."""

import json
import subprocess
import sys
from functools import partial

import launched
import pytest
from records import trials_of
from searchable import TOKEN_FLAGS, save_searchable, save_text

pytestmark = pytest.mark.slow

SAME = ("assignment.yaml", "calibration.json", "sensitivity.json", "noise.json", "groups.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a model and a text, and what one process makes of them."""
    folders = {}

    def make(kind, *flags):
        if (kind, *flags) not in folders:
            folder = tmp_path_factory.mktemp(kind)
            save_searchable(kind, folder / "model", num_hidden_layers=3)
            save_text(folder / "text")
            command = [
                sys.executable,
                "-m",
                "autoquant",
                *map(str, words(folder, folder / "alone", *flags)),
            ]
            subprocess.run(command, check=True, capture_output=True)
            folders[kind, *flags] = folder, outcome(folder / "alone")
        return folders[kind, *flags]

    return make


def words(folder, run, *flags):
    """Four batches of search tokens, eight of report tokens."""
    return [
        *("search", folder / "model", "--budget-bpe", 9, "--calibration", folder / "text"),
        *(*TOKEN_FLAGS, "--batch-tokens", 128, "--no-mlflow", "--trials", 4, "--out", run, *flags),
    ]


def outcome(run):
    """What a run left, without times and names of folders."""
    result = json.loads((run / "result.json").read_text())
    for row in result["stages"]:
        row.pop("seconds")
    left_out = ("seconds", "command", "checkpoint", "checksum")
    trials = [{**trial, "seconds": 0.0} for trial in trials_of(run)]
    assert len(trials) > 4
    exported = json.loads((run / "checkpoint" / "autoquant.json").read_text())
    codes = {path.name: path.read_bytes() for path in (run / "codes").iterdir()}
    return (
        {name: value for name, value in result.items() if name not in left_out},
        trials,
        exported["sha256"],
        codes,
        {name: (run / name).read_bytes() for name in SAME},
    )


@pytest.mark.parametrize(
    ("kind", "size", "weights"),
    [
        ("llama", 2, "disk"),
        ("llama", 4, "resident"),
        ("minimax_m2", 2, "resident"),
        ("minimax_m2", 3, "host"),
    ],
)
def test_the_result_does_not_depend_on_the_number_of_processes(made, kind, size, weights):
    folder, alone = made(kind)
    run = folder / f"{size}-{weights}"
    ended = launched.torchrun(size, words(folder, run, "--weights", weights))
    assert ended.returncode == 0, ended.stderr
    assert outcome(run) == alone
    assert ended.stdout.count("this search") == 1  # one of them prints
    assert ended.stderr.count("confirm:") == 1


def kill_at(line, victim, processes, logs):
    """End a process when the leader prints a line, and wait for the others to end by themselves."""
    launched.wait_for(line, partial(launched.printed, logs, 0, "err"), processes[0])
    processes[victim].kill()
    return [process.wait(timeout=launched.PATIENCE) for process in processes]


@pytest.mark.parametrize(
    ("line", "victim", "flags"),
    [
        (r"^probe \d", 1, ()),
        (r"^trial   3", 0, ()),
        (r"^confirm:", 1, ()),
        (r"^polish:", 1, ("--effort", "max")),
    ],
)
def test_a_process_that_dies_ends_all_and_the_same_command_goes_on(
    made, tmp_path, line, victim, flags
):
    folder, alone = made("llama", *flags)
    run = tmp_path / "run"
    command = words(folder, run, *flags)
    processes = launched.start([command] * 2, tmp_path / "killed")
    codes = kill_at(line, victim, processes, tmp_path / "killed")
    assert codes.pop(victim) == -9
    assert codes == [130]
    (error,) = launched.errors(tmp_path / "killed", 2)
    assert "another process of this run has ended" in error
    assert not (run / "result.json").exists()
    (alone_again,) = launched.start([command], tmp_path / "again")  # any number goes on
    assert alone_again.wait(timeout=launched.PATIENCE) == 0
    assert outcome(run) == alone
