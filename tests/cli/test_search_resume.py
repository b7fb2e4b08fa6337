"""Searches that are stopped, by a signal or a kill, and go on to the same end."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient
from records import trials_of
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.cli.terminal import Terminal

ROOT = Path(__file__).parents[2]
FLAGS = (*TOKEN_FLAGS, "--batch-tokens", 64, "--budget-bpe", 8.5)
FLAGS = (*FLAGS, "--trials", 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    save_searchable("qwen3_moe", folder / "model")
    save_text(folder / "text")
    return folder


def arguments(folder, *flags):
    calibration = ("--calibration", folder / "text")
    return [str(a) for a in ("search", folder / "model", *calibration, *FLAGS, *flags)]


class Process:
    """`autoquant` in a process of its own, in the folder `folder`."""

    def __init__(self, folder, arguments):
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "autoquant", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def stop(self, number, file, lines):
        """Send a signal once `file` has so many lines; the exit code and standard error."""
        try:
            while not (file.exists() and file.read_bytes().count(b"\n") >= lines):
                assert self.process.poll() is None, self.process.communicate()[1]
                time.sleep(0.002)
            self.process.send_signal(number)
            output, errors = self.process.communicate(timeout=120)
        finally:
            self.process.kill()
        assert output == ""
        return self.process.returncode, errors


def require_whole(run):
    """Nothing is half-written: every file can be read, and no temporary one is left."""
    for file in run.iterdir():
        assert not file.name.endswith(".tmp")
        if file.suffix == ".json":
            json.loads(file.read_text())
        if file.suffix == ".jsonl":
            for line in file.read_bytes().split(b"\n")[:-1]:
                json.loads(line)
    assert not (run / "checkpoint").exists()


def outcome(run):
    """What a search found and measured, times left out."""
    result = json.loads((run / "result.json").read_text())
    trials = trials_of(run)
    keys = ("number", "stage", "name", "kl", "stderr", "digest", "params")
    return (
        {name: result[name] for name in ("kl", "bpe", "winner", "finalists", "baselines")},
        [[trial[key] for key in keys] for trial in trials],
        yaml.safe_load((run / "assignment.yaml").read_text()),
        json.loads((run / "sensitivity.json").read_text()),
    )


def status_of(run):
    return json.loads((run / "run.json").read_text())["status"]


@pytest.mark.slow
def test_a_search_that_was_stopped_three_times_ends_as_if_it_had_not_been(folder, autoquant):
    whole = autoquant(*arguments(folder, "--no-mlflow", "--out", folder / "whole"))
    assert whole.exit_code == 0, whole.stderr

    typed = arguments(folder, "--no-mlflow", "--fresh")
    (model := folder / "runs").mkdir()
    process = Process(folder, typed)
    while not (runs := [path for path in model.iterdir() if path.is_dir()]):
        assert process.process.poll() is None, process.process.communicate()[1]
        time.sleep(0.01)
    (run,) = runs
    code, errors = process.stop(signal.SIGINT, run / "sensitivity.jsonl", 12)
    assert code == 130
    *_, advice, resume = errors.splitlines()
    assert advice == "interrupted; to go on from here:"
    resumed = shlex.split(resume)
    assert resumed == ["autoquant", *(a for a in typed if a != "--fresh")]
    assert status_of(run) == "interrupted"
    assert not (run / "sensitivity.json").exists()
    require_whole(run)

    code, errors = Process(folder, resumed[1:]).stop(signal.SIGTERM, run / "study.log", 10)
    assert code == 130
    assert errors.splitlines()[-1].strip() == resume.strip()
    require_whole(run)

    code, _ = Process(folder, resumed[1:]).stop(signal.SIGKILL, run / "study.log", 22)
    assert code == -signal.SIGKILL
    assert status_of(run) == "running"
    with (run / "study.log").open("ab") as trials:
        trials.write(b'{"schema_version": 1, "op_code": 4, "study_id"')

    last = autoquant(*arguments(folder, "--no-mlflow", "--out", run))
    assert last.exit_code == 0, last.stderr
    assert status_of(run) == "finished"
    assert outcome(run) == outcome(folder / "whole")
    weights = "checkpoint/model.safetensors"
    assert (run / weights).read_bytes() == (folder / "whole" / weights).read_bytes()


@pytest.mark.slow
def test_mlflow_follows_a_search_through_an_interruption(folder, autoquant, tmp_path, monkeypatch):
    short = ("--trials", 2, "--sampler", "tpe", "--no-export")
    command = arguments(folder, *short, "--out", tmp_path / "run")
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def stop(terminal, trial, best):
        if trial.number == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Terminal, "trial", stop)
        assert autoquant(*command).exit_code == 130
    assert recorded(store).info.status == "KILLED"

    last = autoquant(*command)
    assert last.exit_code == 0, last.stderr
    run = recorded(store)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert run.info.status == "FINISHED"
    assert run.data.metrics["result/kl"] == result["kl"]["mean"]
    assert run.data.params["budget_bpe"] == "8.5"
    steps = [m.step for m in MlflowClient(store).get_metric_history(run.info.run_id, "kl")]
    assert steps == list(range(result["trials"]))


def recorded(store):
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("autoquant")
    found = client.search_runs([experiment.experiment_id])
    (run,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return run
