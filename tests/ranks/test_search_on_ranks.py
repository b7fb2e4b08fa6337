"""Processes that share a search end as one process does, and none waits for one that is gone."""

import json
from functools import partial

import launched
import pytest
from records import trials_of
from searchable import TOKEN_FLAGS, save_searchable, save_text

pytestmark = pytest.mark.slow

WHOLE = {"llama": (), "minimax_m2": ("--search-tokens", 384)}
"""Of each model, flags of its searches: three batches of search tokens, or four."""

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
            launched.in_this_process(words(folder, folder / "alone", *flags))
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


def by_torchrun(size, command, logs):
    """What the processes of a launcher print."""
    ended = launched.torchrun(size, command)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, ended.stderr


def by_variables(size, command, logs):
    """What processes print that are told of each other as `srun` tells them."""
    processes = launched.start([command] * size, logs)
    codes = [process.wait(timeout=launched.PATIENCE) for process in processes]
    assert codes == [0] * size, launched.printed(logs, 0, "err")
    return [
        "".join(launched.printed(logs, rank, stream) for rank in range(size))
        for stream in ("out", "err")
    ]


@pytest.mark.parametrize(
    ("kind", "size", "weights", "started"),
    [
        ("llama", 2, "disk", by_variables),
        ("minimax_m2", 2, "resident", by_variables),
        ("minimax_m2", 3, "host", by_torchrun),  # a batch of search tokens for each
    ],
)
def test_the_result_does_not_depend_on_the_number_of_processes(
    made, tmp_path, kind, size, weights, started
):
    folder, alone = made(kind, *WHOLE[kind])
    run = folder / f"{size}-{weights}"
    command = words(folder, run, *WHOLE[kind], "--weights", weights)
    out, err = started(size, command, tmp_path / "logs")
    assert outcome(run) == alone
    assert out.count("this search") == 1  # one of them prints
    assert err.count("confirm:") == 1


def kill_at(line, victim, processes, logs):
    """End a process when the leader prints a line, and wait for the others to end by themselves."""
    launched.wait_for(line, partial(launched.printed, logs, 0, "err"), processes[0])
    processes[victim].kill()
    return [process.wait(timeout=launched.PATIENCE) for process in processes]


DEATHS = ((r"^probe \d", 1), (r"^trial   3", 0), (r"^confirm:", 1), (r"^polish:", 1))
"""Lines, in the order of a search, and the process that is killed when the leader prints one."""


def test_a_process_that_dies_ends_all_and_the_same_command_goes_on(made, tmp_path):
    flags = ("--effort", "max")
    folder, alone = made("llama", *flags)
    run = tmp_path / "run"
    command = words(folder, run, *flags)
    for number, (line, victim) in enumerate(DEATHS):
        logs = tmp_path / f"killed-{number}"
        processes = launched.start([command] * 2, logs)
        codes = kill_at(line, victim, processes, logs)
        assert codes.pop(victim) == -9
        assert codes == [130]
        (error,) = launched.errors(logs, 2)
        assert "another process of this run has ended" in error
        assert not (run / "result.json").exists()
    launched.in_this_process(command)  # any number goes on
    assert outcome(run) == alone
