"""What passes between processes: results in order, failures of one to all, tasks of the leader."""

import os
import signal
from contextlib import suppress
from functools import partial

import pytest
import torch

from autoquant.errors import ConfigError, OutOfMemory, RankLost
from autoquant.measure.ranks import group
from autoquant.measure.ranks.group import is_follower, is_launched, process_group
from autoquant.measure.ranks.ranks import ALONE
from autoquant.measure.ranks.together import OF_THE_LEADER, announce_step, follow, lead, together


def in_a_group(rank, file, size, work):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size
    )
    with suppress(ZeroDivisionError), process_group() as ranks:
        work(ranks)
    assert torch.distributed.is_initialized()  # it is somebody else's
    torch.distributed.destroy_process_group()


def in_groups_that_end(rank, folder, size, works):
    """Each work in a group of its own, one after the other in the same processes."""
    for number, work in enumerate(works):
        in_a_group_that_ends(rank, f"{folder}/{number}", size, work)


def in_a_group_that_ends(rank, file, size, work):
    def whole(ranks):
        threads.append(len(os.listdir("/proc/self/task")))
        work(ranks)

    threads = []
    in_a_group(rank, file, size, whole)
    assert threads, f"{work.__name__} did not begin"
    assert len(os.listdir("/proc/self/task")) < threads[0]  # one that outlives Python aborts it


def gather(ranks):
    items = list(range(7))
    assert ranks.gathered(lambda: [10 * item for item in ranks.dealt(items)]) == [*range(0, 70, 10)]
    assert ranks.all_of(lambda: ranks.number) == [0, 1, 2]
    assert ranks.own(lambda: ranks.number) == ranks.number


def fail(ranks):
    def work():
        if ranks.number == 1:
            raise OutOfMemory("it does not fit", fix="buy more")
        return []

    with pytest.raises(OutOfMemory, match="it does not fit") as caught:
        ranks.gathered(work)
    assert caught.value.fix == "buy more"
    assert ranks.all_of(lambda: 1) == [1, 1, 1]  # the ranks go on together


def fail_before_the_others_meet(ranks):
    def load():
        if ranks.number == 2:
            raise OutOfMemory("no room here", fix="make some")
        return ranks.own(lambda: "weights")

    with pytest.raises(OutOfMemory, match="no room here"):
        ranks.own(load)
    assert ranks.own(lambda: ranks.own(lambda: 7)) == 7
    assert ranks.all_of(lambda: ranks.number) == [0, 1, 2]


def end_by_an_error(ranks):
    ranks.own(lambda: ranks.number / 0)


class Measurer:
    def __init__(self, ranks):
        self.ranks, self.seen = ranks, []

    @together
    def note(self, value, *, told=None):
        self.seen.append(value)
        if told:
            told(value)

    @together
    def break_on(self, rank):
        self.ranks.own(lambda: 1 / (self.ranks.number - rank))


def tasks(ranks):
    made, told = [], []

    def load():
        made.append(Measurer(ranks))
        return made[-1]

    def work():
        measurer = Measurer(ranks)
        announce_step(ranks, "load")
        measurer.note("one", told=told.append)
        with pytest.raises(ZeroDivisionError):
            measurer.break_on(1)
        measurer.note("two")
        return "the end"

    if ranks.is_leader:
        assert lead(ranks, work) == "the end"
        assert told == ["one"]
    else:
        assert follow(ranks, {"load": load}) == "the end"
        assert [own.seen for own in made] == [["one", "two"]]


def a_failure_of_the_leader(ranks):
    def work():
        raise ConfigError("no such thing", fix="name another")

    with pytest.raises(ConfigError, match="no such thing") as caught:
        lead(ranks, work) if ranks.is_leader else follow(ranks, {})
    assert (OF_THE_LEADER in getattr(caught.value, "__notes__", ())) is not ranks.is_leader


@pytest.mark.slow
def test_a_group_of_somebody_else_serves(tmp_path):
    works = gather, fail, fail_before_the_others_meet, end_by_an_error, tasks
    works = (*works, a_failure_of_the_leader)
    torch.multiprocessing.spawn(in_groups_that_end, (str(tmp_path), 3, works), nprocs=3)


def test_a_process_alone_sends_nothing():
    with process_group() as ranks:
        assert ranks is ALONE
    assert ALONE.gathered(lambda: [1, 2]) == [1, 2]
    assert ALONE.own(partial(int, "3")) == 3
    assert lead(ALONE, lambda: "result") == "result"


def test_a_launcher_that_ends_a_process_is_told_apart_from_a_crash():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RankLost, match="SIGTERM"), group._terminated_as_lost():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("variables", "launched", "follows"),
    [
        ({}, False, False),
        ({"RANK": "1", "WORLD_SIZE": "1", "MASTER_ADDR": "here"}, False, False),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False, False),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, True, False),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, True, True),
    ],
)
def test_a_launcher_is_known_by_what_it_exports(monkeypatch, variables, launched, follows):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (is_launched(), is_follower()) == (launched, follows)
