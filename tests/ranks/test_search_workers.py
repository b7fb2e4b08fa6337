"""Workers share the trials of a round, and the search ends as one process ends it."""

import re
import shutil
import signal
import threading
import time
from pathlib import Path

import launched
import pytest
from records import timeless
from searchable import save_searchable, save_text
from storage_servers import Proxy, running
from test_search_on_ranks import outcome, words

from autoquant.measure.workers.pool import WorkerPool
from autoquant.measure.workers.process import ProcessWorker
from autoquant.study.joining import worker as joined_worker
from autoquant.study.joining.roster import Roster
from autoquant.study.joining.worker import JoinedWorker

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

    def patient(pool, requests, coming):
        for _ in pool._workers[len(started) :]:
            assert ready.acquire(timeout=launched.PATIENCE)
        while pool._todo and any(thread.is_alive() for thread in pool._threads):
            time.sleep(0.005)
        return own(pool, requests, coming)

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


@pytest.fixture
def copied(made, tmp_path):
    """What another machine has: a model and a text of the same content."""
    folder, _ = made("llama")
    shutil.copytree(folder / "model", tmp_path / "there" / "model")
    shutil.copytree(folder / "text", tmp_path / "there" / "text-of-mine")
    return tmp_path / "there"


def joining(folder, url, *flags):
    """The command of a worker with its own copies, and no folder to write to."""
    command = ["join", *words(folder, "", *ROUND, "--study-storage", url)[1:]]
    out = command.index("--out")
    command[command.index("--calibration") + 1] = folder / "text-of-mine"
    return [*command[:out], *command[out + 2 :], *flags]


@pytest.fixture
def joined(monkeypatch):
    """How many requests each order of joined workers had; the search begins when one is there, and
    measures when they have taken the rest."""
    orders = []
    own, newcomers, measure = WorkerPool._own_measure, Roster.newcomers, JoinedWorker.measure

    def first_one(roster):
        found = newcomers(roster)
        deadline = time.monotonic() + launched.PATIENCE
        while not found and not orders:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            found = newcomers(roster)
        return found

    def patient(pool, requests, coming):
        while pool._todo and any(thread.is_alive() for thread in pool._threads):
            time.sleep(0.005)
        return own(pool, requests, coming)

    def count(worker, requests):
        orders.append(len(requests))
        return measure(worker, requests)

    monkeypatch.setattr(Roster, "newcomers", first_one)
    monkeypatch.setattr(WorkerPool, "_own_measure", patient)
    monkeypatch.setattr(JoinedWorker, "measure", count)
    return orders


def measured_by(log):
    return [int(count) for count in re.findall(r"^trials measured: (\d+)", log.read_text(), re.M)]


def test_a_worker_of_another_machine_changes_nothing(made, copied, autoquant, joined, tmp_path):
    folder, alone = made("llama")
    log = tmp_path / "err"
    with running(Proxy(tmp_path)) as server, launched.alone(joining(copied, server.url), log) as it:
        flags = (*ROUND, "--study-storage", server.url)
        done = autoquant(*words(folder, tmp_path / "run", *flags))
        assert done.exit_code == 0, done.stderr
        assert it.wait(timeout=launched.PATIENCE) == 0, log.read_text()
    assert told(tmp_path / "run") == alone
    assert measured_by(log) == joined
    assert sum(joined) > 4


def test_a_worker_of_another_machine_that_is_killed_changes_nothing(
    made, copied, autoquant, joined, monkeypatch, tmp_path
):
    folder, alone = made("llama")
    url, log = f"sqlite:///{tmp_path / 'study.db'}", tmp_path / "err"
    monkeypatch.setattr(joined_worker, "LEASE", 5.0)
    measure = JoinedWorker.measure
    sees_the_run = ("--out", tmp_path / "run")
    with launched.alone(joining(copied, url, *sees_the_run), log) as process:

        def killed(worker, requests):
            if len(joined) == 1:
                process.kill()
            return measure(worker, requests)

        monkeypatch.setattr(JoinedWorker, "measure", killed)
        done = autoquant(*words(folder, tmp_path / "run", *ROUND, "--study-storage", url))
    assert done.exit_code == 0, done.stderr
    assert told(tmp_path / "run") == alone
    came, went = (line for line in done.stderr.splitlines() if "Worker 0" in line)
    assert "takes part" in came
    assert "no sign of life for 5 seconds. What it measured is measured again" in went
    assert "went away" not in done.stderr


def test_a_worker_of_another_machine_outlives_a_search_that_is_killed(
    made, copied, autoquant, joined, tmp_path
):
    folder, alone = made("llama")
    url, log, mine = f"sqlite:///{tmp_path / 'study.db'}", tmp_path / "err", tmp_path / "mine"
    command = words(folder, tmp_path / "run", *ROUND, "--study-storage", url)
    with launched.alone(joining(copied, url), log) as it:
        launched.wait_for("^looks for its search", log.read_text, it)
        with launched.alone(command, mine) as search:
            launched.wait_for("^joins the search", log.read_text, it)
            launched.wait_for("^trial   4", mine.read_text, search)
            search.kill()
        assert not (tmp_path / "run" / "result.json").exists()
        done = autoquant(*command)
        assert done.exit_code == 0, done.stderr
        assert it.wait(timeout=launched.PATIENCE) == 0, log.read_text()
    assert told(tmp_path / "run") == alone
    assert sum(measured_by(log)) >= sum(joined) > 0
