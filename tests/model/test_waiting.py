"""Threads that wait sleep at once while other programs use the cores, and only then."""

import os
import subprocess
import sys

import pytest
import torch

from autoquant.model import waiting
from autoquant.model.waiting import CoreTimes, ThreadWaits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux says what its cores do")


@pytest.fixture
def two_threads(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.fixture
def times(monkeypatch):
    """The times that the next looks find: (wall, busy, own) in seconds."""
    found: list[tuple[float, float, float]] = []
    monkeypatch.setattr(CoreTimes, "now", lambda: CoreTimes(*found.pop(0)))
    return found


@pytest.mark.usefixtures("two_threads")
def test_threads_sleep_at_once_while_others_work(times):
    times += [(0, 0, 0), (10, 12, 10), (20, 32, 20), (30, 51, 30), (40, 62, 40), (50, 73, 50)]
    waits, slept = ThreadWaits(), []
    for _ in range(6):
        waits.adapt()
        slept.append(waits.sleep_at_once)
    # Others used nothing known, 0.2, 1.0, 0.9, 0.1 and 0.1 cores.
    assert slept == [False, False, True, True, False, False]


@pytest.mark.usefixtures("two_threads")
def test_two_looks_are_apart(times):
    times += [(0, 0, 0), (0.1, 0.2, 0.1), (10, 10.0, 10)]
    waits = ThreadWaits()
    for _ in range(3):
        waits.adapt()
        assert not waits.sleep_at_once


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("variable", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_the_users_word_counts(variable, times, monkeypatch):
    monkeypatch.setenv(variable, "ACTIVE" if variable == "OMP_WAIT_POLICY" else "1000")
    waits = ThreadWaits()
    waits.adapt()
    assert not times
    assert not waits.sleep_at_once


def test_the_kernels_count_is_of_work_and_of_the_cores_allowed(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\n"
        "cpu0 100 20 30 4000 500 6 7 8 90 0\n"
        "cpu1 200 0 0 4000 500 0 0 0 0 0\n"
        "cpu2 900 0 0 4000 500 0 0 0 0 0\n"
        "intr 12345\n"
    )
    monkeypatch.setattr(waiting, "_STAT", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    ticks = 100 + 20 + 30 + 6 + 7 + 8 + 200
    assert CoreTimes.now().busy == ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_a_second_team_of_threads_comes_and_goes():
    code = """
import os, time, torch
from autoquant.model.waiting import ThreadWaits
torch.ones(1 << 20).add_(1)
threads = lambda: len(os.listdir("/proc/self/task"))
before, waits = threads(), ThreadWaits()
waits._change(True)
waits._change(True)
during = threads()
waits._change(False)
end = time.monotonic() + 30
while threads() > before and time.monotonic() < end:
    time.sleep(0.01)
print(torch.get_num_threads(), during - before, threads() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    team, more, left = map(int, done.stdout.split())
    assert (more, left) == (team, 0)
