"""Requests shared among workers: told in order, whoever measures them and whoever dies."""

import os
import threading
import time
from pathlib import Path

import pytest
from toy_worker import worth

from autoquant.errors import OutOfMemory, SourceError
from autoquant.formats import BF16
from autoquant.measure.evaluator import Request
from autoquant.measure.workers.pool import WorkerLost, WorkerPool
from autoquant.measure.workers.process import ProcessWorker
from autoquant.plan.assignment import Assignment

HERE = str(Path(__file__).parent)


def request(name):
    return Request(assignment=Assignment.of({name: BF16}))


ROUND = [request("g" * length) for length in range(1, 9)]


class Own:
    """This process; `before` lets others go first."""

    def __init__(self, before=lambda: None):
        self.before, self.asked = before, []

    def measure(self, requests, coming=()):
        self.before()
        self.asked.append(len(requests))
        return map(worth, requests)


class Fake:
    """A worker in a thread: waits for its turn, and may be lost."""

    def __init__(self, *, lives=100, turn=lambda: None, error=None):
        self.lives, self.turn, self.error, self.is_closed = lives, turn, error, False
        self.asked = []

    def start(self):
        if self.error is not None:
            raise self.error

    def measure(self, requests):
        self.turn()
        if len(self.asked) == self.lives:
            raise WorkerLost("Worker 1 has ended (SIGKILL).", fix="")
        self.asked.append(len(requests))
        return [worth(request) for request in requests]

    def close(self):
        self.is_closed = True


def values(measurements):
    return [measurement.kl for measurement in measurements]


IN_ORDER = values(map(worth, ROUND))


@pytest.fixture
def warned():
    return []


def test_measurements_come_in_the_order_of_the_requests_and_each_is_made_once(warned):
    own, fakes = Own(lambda: time.sleep(0.002)), [Fake(turn=lambda: time.sleep(0.005)), Fake()]
    with WorkerPool(own, fakes, warn=warned.append) as pool:
        rounds = 0
        while rounds < 5 or not all(each.asked for each in (own, *fakes)):
            assert values(pool.measure(ROUND)) == IN_ORDER
            rounds += 1
    assert sum(sum(each.asked) for each in (own, *fakes)) == rounds * len(ROUND)
    assert all(fake.is_closed for fake in fakes)
    assert warned == []


@pytest.mark.parametrize(
    ("workers", "shares"), [(0, [8]), (1, [4, 4]), (2, [2, 3, 3]), (9, [1] * 8)]
)
def test_a_call_is_split_evenly(warned, workers, shares):
    own, fakes = Own(), [Fake() for _ in range(workers)]
    with WorkerPool(own, fakes, warn=warned.append) as pool:
        assert values(pool.measure(ROUND)) == IN_ORDER
    assert sorted(count for each in (own, *fakes) for count in each.asked) == shares


def test_what_a_lost_worker_was_asked_for_is_measured_by_the_others(warned):
    taken = threading.Event()
    own = Own(lambda: taken.wait(10))
    with WorkerPool(own, [Fake(lives=0, turn=taken.set)], warn=warned.append) as pool:
        assert values(pool.measure(ROUND)) == IN_ORDER
        assert sum(own.asked) == len(ROUND)
        assert values(pool.measure(ROUND)) == IN_ORDER
    assert warned == [
        "Worker 1 has ended (SIGKILL). What it measured is measured again by the others."
    ]


def test_what_keeps_a_worker_from_measuring_ends_the_search(warned):
    unable = Fake(error=OutOfMemory("no room for a second model", fix="start fewer"))
    with WorkerPool(Own(lambda: time.sleep(0.01)), [unable], warn=warned.append) as pool:
        rounds = (each for _ in range(1000) for each in pool.measure(ROUND))
        with pytest.raises(OutOfMemory, match="second model"):
            list(rounds)


def test_an_error_is_raised_in_its_place(warned):
    class Fails(Own):
        def measure(self, requests, coming=()):
            raise SourceError(f"{len(next(iter(requests[0].assignment))[0])}", fix="")

    with WorkerPool(Fails(), [], warn=warned.append) as pool:
        measured = pool.measure(ROUND)
        with pytest.raises(SourceError, match="1"):
            next(measured)
        own = pool._own = Own()
        assert values(pool.measure(ROUND[:2])) == [1.0, 2.0]
    assert own.asked == [2]  # of the call that failed nothing is left


@pytest.fixture
def process(monkeypatch):
    made = []

    def make(order="toy", **environment):
        path = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
        made.append(ProcessWorker(1, "toy_worker", order, {"PYTHONPATH": path, **environment}))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


@pytest.mark.slow
def test_a_process_measures_in_the_order_asked_and_goes_on_after_an_error(process):
    worker = process()
    worker.start()
    found = worker.measure(ROUND)
    assert values(found) == IN_ORDER
    assert found[0].seconds not in (0.0, float(os.getpid()))
    with pytest.raises(SourceError, match="no such block"):
        worker.measure([request("raise")])
    assert values(worker.measure(ROUND[:1])) == [1.0]
    # Ctrl-C goes to all of a terminal's group.
    assert os.getpgid(int(found[0].seconds)) != os.getpgid(0)
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(found[0].seconds), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "error", "said"),
    [
        ("too large", OutOfMemory, "it does not fit beside the others"),
        ("dies", WorkerLost, r"Worker 1 has ended \(exit code 3\)"),
    ],
)
def test_a_process_that_cannot_start_says_why(process, order, error, said):
    with pytest.raises(error, match=said):
        process(order).start()


@pytest.mark.slow
def test_a_process_that_is_killed_is_lost_and_one_that_is_closed_never_starts(process):
    worker = process()
    worker.start()
    with pytest.raises(WorkerLost, match=r"Worker 1 has ended \(SIGKILL\)"):
        worker.measure([request("kill")])
    closed = process()
    closed.close()
    with pytest.raises(WorkerLost, match="closed before it started"):
        closed.start()


@pytest.mark.slow
def test_a_pool_of_processes_outlives_one_of_them(process, warned):
    round_ = [request("g"), request("kill")]

    class Careful(Own):
        def measure(self, requests, coming=()):
            if started.wait(60) and requests[0] is not round_[1]:
                time.sleep(0.05)
            return super().measure(requests)

    started, worker = threading.Event(), process()
    begin = worker.start
    worker.start = lambda: (begin(), started.set())
    own = Careful()
    with WorkerPool(own, [worker], warn=warned.append) as pool:
        for _ in range(200):
            assert values(pool.measure(round_)) == [1.0, 4.0]
            if warned:
                break
    assert warned == [
        "Worker 1 has ended (SIGKILL). What it measured is measured again by the others."
    ]
