"""Workers that join through a storage: told in order, whoever measures and whoever goes away."""

import random
import re
import sqlite3
import threading
import time
from contextlib import contextmanager, suppress

import optuna
import pytest
from joint import driver_of, explored, summed

from autoquant.errors import ConfigError, RunConflict
from autoquant.measure.workers.pool import WorkerPool
from autoquant.search.quiet import quietly
from autoquant.study.joining import link, watch
from autoquant.study.joining import worker as joined
from autoquant.study.joining.link import ANSWER, BEAT, HOST, SUFFIX, order_of
from autoquant.study.joining.membership import Membership
from autoquant.study.joining.roster import Roster
from autoquant.study.joining.searches import Searches
from autoquant.study.mirror import open_storage

NAME = f"tiny-6bpe{SUFFIX}"
ABOUT_IT = {"model": "tiny", "trials_at_once": 4}
OFFER = {"calibration": {}}
WITHIN = 60.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(link, "INTERVAL", 0.02)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'study.db'}"


def roster_at(url, about=ABOUT_IT, name=NAME):
    return Roster.open(open_storage(url), name, about)


@contextmanager
def killed(url, about=ABOUT_IT):
    """The roster of a search that leaves what a killed one does."""
    with suppress(KeyboardInterrupt), roster_at(url, about) as at:
        yield at
        raise KeyboardInterrupt


def wait_until(holds):
    deadline = time.monotonic() + WITHIN
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def heard_of(at):
    """How many workers are there."""
    with at._link.changed:
        return sum(worker.is_there for worker in at._workers.values())


def trials_at(url):
    with quietly():
        return optuna.load_study(study_name=NAME, storage=url).trials


class Unsteady:
    """An evaluator that takes its time, after something holds; or goes away when it is asked."""

    def __init__(self, evaluator, seed, *, ready=lambda: True, goes=False):
        self.evaluator, self.random, self.ready = evaluator, random.Random(seed), ready
        self.goes, self.has_gone = goes, False

    def measure(self, requests, coming=()):
        if self.goes:
            self.has_gone = True
            raise EOFError("gone")
        wait_until(self.ready)
        time.sleep(self.random.random() * 0.03)
        return self.evaluator.measure(requests, coming)


class Joining(threading.Thread):
    """A worker in a thread, and what came of it."""

    def __init__(self, url, evaluator):
        super().__init__(daemon=True)
        self.url, self.evaluator = url, evaluator
        self.told, self.served, self.error = [], None, None
        self.is_looking = threading.Event()
        self.start()

    def run(self):
        try:
            storage = open_storage(self.url)
            self.is_looking.set()
            with Searches(storage, ABOUT_IT) as searches:
                name = searches.ours()
            with Membership(storage, name, ABOUT_IT) as member:
                assert member.offer() == OFFER
                self.served = member.serve(self.evaluator, self.told.append)
        except Exception as error:
            self.error = error


@contextmanager
def pool_of(own, at, warned):
    with WorkerPool(own, [], warn=warned.append, newcomers=at.newcomers) as pool:
        yield pool


class Patient:
    """This process's evaluator, which lets others go first."""

    def __init__(self, evaluator, ready=lambda: True):
        self.evaluator, self.ready = evaluator, ready

    def measure(self, requests, coming=()):
        wait_until(self.ready)
        time.sleep(0.01)
        return self.evaluator.measure(requests, coming)


def facts(driver):
    return [{**trial.to_dict(), "seconds": 0.0} for trial in driver.history.trials]


@pytest.fixture(scope="module")
def alone(problem):
    """A search with rounds of four in one process."""
    driver = driver_of(problem, summed(problem), width=4)
    explored(problem, driver, 4)
    return driver


def search(problem, evaluator):
    driver = driver_of(problem, summed(problem), width=4, evaluator=evaluator)
    explored(problem, driver, 4)
    return facts(driver)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_search_is_the_same_whoever_joins_and_leaves_and_whoever_is_first(
    problem, alone, url, seed
):
    own, warned = alone.evaluator, []
    leaves = Unsteady(own, seed, goes=True)

    def unsteady(number):
        return Unsteady(own, 10 * seed + number, ready=lambda: leaves.has_gone)

    with roster_at(url) as at:
        gone, *others = workers = [Joining(url, e) for e in (leaves, unsteady(1), unsteady(2))]
        at.offer(OFFER)
        wait_until(lambda: heard_of(at) == 3)
        with pool_of(unsteady(0), at, warned) as pool:
            assert search(problem, pool) == facts(alone)
    for worker in workers:
        worker.join(WITHIN)
    assert isinstance(gone.error, EOFError)
    assert all(worker.served for worker in others)
    assert [worker.served for worker in others] == [sum(worker.told) for worker in others]
    (warning,) = warned
    assert "has left. What it measured is measured again by the others." in warning
    assert optuna.get_all_study_names(url) == []


class ByHand:
    """A worker that writes what it is told to."""

    def __init__(self, url):
        with quietly():
            self.study = optuna.load_study(study_name=NAME, storage=url)
        self.trial, self.beats = self.study.ask(), 0
        self.write(HOST, "hand")

    def beat(self, order=None):
        self.beats += 1
        self.write(BEAT, [order, self.beats])

    def write(self, name, value):
        self.trial.set_user_attr(name, value)

    def order(self):
        return self.study.user_attrs.get(order_of(self.trial.number))

    def live(self, until):
        """Give signs of life until something holds."""

        def alive():
            self.beat()
            return until()

        wait_until(alive)


def shortly_leased(worker, monkeypatch):
    """Whether the worker has an order; once it has one, its lease is short."""

    def has_order():
        if worker.order() is None:
            return False
        monkeypatch.setattr(joined, "LEASE", 0.3)
        return True

    return has_order


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (None, r"has given no sign of life for \d+ seconds"),
        ([{}], "has answered what is no measurement"),
        ([], r"has answered 0 of \d+ requests"),
    ],
)
def test_what_a_worker_does_not_measure_is_measured_by_the_others(
    problem, alone, url, monkeypatch, answers, said
):
    warned = []
    with roster_at(url) as at:
        worker = ByHand(url)
        worker.live(lambda: heard_of(at) == 1)
        over = threading.Event()

        def answer():
            while not over.wait(0.02):
                order = worker.order() or {"id": None}
                worker.write(ANSWER, {"id": order["id"], "measurements": answers})
                worker.beat(order["id"])

        thread = threading.Thread(target=answer, daemon=True)
        if answers is None:
            ready = shortly_leased(worker, monkeypatch)
        else:
            ready = worker.order
            thread.start()
        with pool_of(Patient(alone.evaluator, ready), at, warned) as pool:
            assert search(problem, pool) == facts(alone)
        over.set()
        if answers is not None:
            thread.join()
    assert re.match(rf"Worker 0 \(hand\) {said}\.", warned[0])


def test_a_worker_that_is_at_another_searchs_order_is_not_waited_for(
    problem, alone, url, monkeypatch
):
    warned = []
    with roster_at(url) as at:
        worker = ByHand(url)
        worker.live(lambda: heard_of(at) == 1)
        busy = threading.Event()

        def beats():
            while not busy.wait(0.02):
                worker.beat("another's")

        thread = threading.Thread(target=beats, daemon=True)
        thread.start()
        with pool_of(
            Patient(alone.evaluator, shortly_leased(worker, monkeypatch)), at, warned
        ) as pool:
            assert search(problem, pool) == facts(alone)
        busy.set()
        thread.join()
    assert "Worker 0 (hand) has given no sign of life" in warned[0]


def test_a_worker_outlives_its_search_and_measures_for_the_next_and_the_dead_are_not_asked(
    problem, alone, url
):
    warned = []
    evaluator = Patient(alone.evaluator)
    with killed(url) as first:
        worker, dead = Joining(url, Unsteady(alone.evaluator, 0)), ByHand(url)
        first.offer(OFFER)
        dead.live(lambda: heard_of(first) == 2)
    assert [trial.state.name for trial in trials_at(url)] == ["RUNNING"] * 2
    with roster_at(url) as second:
        second.offer(OFFER)
        wait_until(lambda: heard_of(second) == 1)
        for _ in range(2):
            before = len(worker.told)
            with pool_of(evaluator, second, warned) as pool:
                assert search(problem, pool) == facts(alone)
            assert len(worker.told) > before
    worker.join(WITHIN)
    assert warned == []


def test_a_worker_of_another_search_is_refused_before_it_registers(url):
    with roster_at(url, ABOUT_IT | {"trials_at_once": 3}):
        worker = Joining(url, None)
        worker.join(WITHIN)
        assert isinstance(worker.error, ConfigError)
        assert "trials_at_once is 3 there and 4 here" in str(worker.error)
        assert "'tiny-6bpe' is another than this worker's" in str(worker.error)
        assert trials_at(url) == []


def test_a_worker_finds_its_search_among_others(url):
    with roster_at(url, {"model": "huge"}, f"another{SUFFIX}"), roster_at(url) as at:
        worker = Joining(url, None)
        at.offer(OFFER)
        wait_until(lambda: heard_of(at) == 1)
    worker.join(WITHIN)
    assert worker.served == 0


def test_a_search_that_was_killed_is_waited_for_and_no_worker_is_refused_for_it(url, monkeypatch):
    monkeypatch.setattr(watch, "PATIENCE", 0.5)
    for trials_at_once in (4, 3):
        with killed(url, ABOUT_IT | {"trials_at_once": trials_at_once}):
            pass
        worker = Joining(url, None)
        worker.join(WITHIN)
        assert isinstance(worker.error, RunConflict)
        assert "no search with these settings was heard of" in str(worker.error)


@pytest.mark.parametrize(
    ("about", "offer"),
    [(ABOUT_IT, {"calibration": {"another": 1}}), (ABOUT_IT | {"torch": "1.0"}, OFFER)],
)
def test_a_search_that_begins_anew_as_another_is_not_measured_for(url, about, offer):
    with killed(url) as first:
        worker = Joining(url, None)
        first.offer(OFFER)
        wait_until(lambda: heard_of(first) == 1)
    with roster_at(url, about) as second:
        second.offer(offer)
        worker.join(WITHIN)
    assert isinstance(worker.error, RunConflict)
    assert "begun anew with other settings, versions or calibration" in str(worker.error)


@pytest.mark.parametrize("is_registered", [False, True])
def test_a_storage_that_goes_away_ends_a_worker(url, monkeypatch, is_registered):
    with killed(url) as at:
        worker = Joining(url, None)
        if is_registered:
            at.offer(OFFER)
            wait_until(lambda: heard_of(at) == 1)
        assert worker.is_looking.wait(WITHIN)
    monkeypatch.setattr(watch, "ANSWERS_WITHIN", 0.3)
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    connection.execute("DROP TABLE studies")
    connection.commit()
    worker.join(WITHIN)
    assert isinstance(worker.error, RunConflict)
    assert "the study's storage has not answered for 0 seconds: " in str(worker.error)
    assert "\n" not in worker.error.message


def test_a_worker_that_stood_still_says_so_and_goes_on(url, monkeypatch):
    """Its threads are held up together, as those of a process that is stopped."""
    for name, seconds in (("ANSWERS_WITHIN", 0.3), ("PATIENCE", 0.3), ("STANDSTILL", 0.5)):
        monkeypatch.setattr(watch, name, seconds)
    notes, offers = [], []
    with roster_at(url) as at, Membership(open_storage(url), NAME, ABOUT_IT, notes.append) as own:
        thread = threading.Thread(target=lambda: offers.append(own.offer()), daemon=True)
        thread.start()
        wait_until(lambda: own._attributes)
        with own._link.changed:
            time.sleep(1.0)
        wait_until(lambda: notes)
        at.offer(OFFER)
        thread.join(WITHIN)
    assert offers == [OFFER]
    assert notes == ["this process stood still for 1 seconds, and goes on."]


def test_a_search_of_the_same_settings_that_is_in_progress_is_not_disturbed(url):
    with roster_at(url) as first:
        first.offer(OFFER)
        with pytest.raises(RunConflict, match="'tiny-6bpe' is in progress") as raised:
            roster_at(url)
        assert "autoquant join" in raised.value.fix
        with quietly():
            study = optuna.load_study(study_name=NAME, storage=url)
        assert study.user_attrs[link.OFFER] == OFFER
