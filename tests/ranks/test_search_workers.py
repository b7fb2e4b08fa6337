"""Workers share the trials of a round, and the search ends as one process ends it."""

import signal
import threading
import time
from pathlib import Path

import launched
import pytest
from records import timeless
from searchable import save_searchable, save_text
from test_search_on_ranks import outcome, words

from autoquant.measure.workers.pool import WorkerPool
from autoquant.measure.workers.process import ProcessWorker

pytestmark = pytest.mark.slow

ROUND = ("--trials-at-once", 4, "--trials", 8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a model and a text, and what one process makes of them."""
    folders = {}

    def make(kind):
        if kind not in folders:
            folder = tmp_path_factory.mktemp(kind)
            save_searchable(kind, folder / "model", num_hidden_layers=3)
            save_text(folder / "text")
            launched.in_this_process(words(folder, folder / "alone", *ROUND))
            folders[kind] = folder, told(folder / "alone")
        return folders[kind]

    return make


def told(run):
    """What a search left, and the lines of its study."""
    return outcome(run), timeless(run / "study.log")


@pytest.fixture
def workers(monkeypatch):
    """The workers of this process's searches; it measures when they have taken the rest."""
    started, ready = [], threading.Semaphore(0)
    begin, measure = ProcessWorker.start, ProcessWorker.measure

    def start(worker):
        begin(worker)
        started.append(worker)
        ready.release()

    def count(worker, requests):
        worker.requests = getattr(worker, "requests", 0) + len(requests)
        return measure(worker, requests)

    own = WorkerPool._own_measure

    def patient(pool, requests):
        for _ in pool._workers[len(started) :]:
            assert ready.acquire(timeout=launched.PATIENCE)
        while pool._todo and any(thread.is_alive() for thread in pool._threads):
            time.sleep(0.005)
        return own(pool, requests)

    monkeypatch.setattr(ProcessWorker, "start", start)
    monkeypatch.setattr(ProcessWorker, "measure", count)
    monkeypatch.setattr(WorkerPool, "_own_measure", patient)
    return started


@pytest.mark.parametrize(
    ("kind", "number", "weights"),
    [("llama", 2, "disk"), ("minimax_m2", 3, "resident")],
)
def test_the_result_does_not_depend_on_the_number_of_workers(
    made, autoquant, workers, kind, number, weights
):
    folder, alone = made(kind)
    run = folder / f"{number}-{weights}"
    flags = (*ROUND, "--workers", number, "--weights", weights)
    done = autoquant(*words(folder, run, *flags))
    assert done.exit_code == 0, done.stderr
    assert told(run) == alone
    assert len(workers) == number - 1
    requests = [worker.requests for worker in workers]
    assert min(requests) > 0
    assert max(requests) > 1
    assert all(worker._process.poll() is not None for worker in workers)


def test_a_worker_that_is_killed_changes_nothing(made, autoquant, workers, monkeypatch, tmp_path):
    folder, alone = made("llama")
    measure = ProcessWorker.measure

    def killed(worker, requests):
        if getattr(worker, "requests", 0) >= 2:
            worker._process.kill()
        return measure(worker, requests)

    monkeypatch.setattr(ProcessWorker, "measure", killed)
    done = autoquant(*words(folder, tmp_path / "run", *ROUND, "--workers", 2))
    assert done.exit_code == 0, done.stderr
    assert told(tmp_path / "run") == alone
    (line,) = (line for line in done.stderr.splitlines() if "Worker 1" in line)
    assert "has ended (SIGKILL). What it measured is measured again by the others." in line


DEATHS = ((signal.SIGKILL, -9, "^trial   2"), (signal.SIGINT, 130, "^trial   6"))
"""How a search ends, its exit code, and the line that it has just printed."""


def test_a_search_that_ends_takes_its_workers_along_and_goes_on(made, tmp_path):
    folder, alone = made("llama")
    run, log = tmp_path / "run", tmp_path / "err"
    command = words(folder, run, *ROUND, "--workers", 2)
    for how, code, line in DEATHS:
        with launched.alone(command, log) as process:
            launched.wait_for(line, log.read_text, process)
            left = children(process.pid)
            process.send_signal(how)
            assert process.wait(timeout=launched.PATIENCE) == code
        assert len(left) == 1
        assert "Traceback" not in log.read_text()
        deadline = time.monotonic() + launched.PATIENCE
        while any(map(is_running, left)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    launched.in_this_process(command)
    assert told(run) == alone


def children(parent):
    """Processes that a process has started."""
    return [
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if parent_of(stat) == parent
    ]


def parent_of(stat):
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended meanwhile
        return None


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_more_workers_than_trials_of_a_round_are_refused(autoquant, made, tmp_path):
    folder, _ = made("llama")
    done = autoquant(*words(folder, tmp_path / "run", "--workers", 2))
    assert done.exit_code == 2
    assert "--workers 2 share the trials of a round, and --trials-at-once 1 is less" in done.stderr
    assert "fix: give --trials-at-once 2 or more" in done.stderr


def test_processes_of_a_launcher_have_no_workers(made, tmp_path):
    folder, _ = made("llama")
    command = words(folder, tmp_path / "run", *ROUND, "--workers", 2)
    processes = launched.start([command] * 2, tmp_path / "logs")
    assert [process.wait(timeout=launched.PATIENCE) for process in processes] == [2, 2]
    (error,) = launched.errors(tmp_path / "logs", 2)
    assert "2 processes share the batches of this search, and --workers 2 would share" in error
