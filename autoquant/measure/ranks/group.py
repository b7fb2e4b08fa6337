"""The process group that this process belongs to: of `torchrun`, or made by somebody else."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

from autoquant.errors import RankLost
from autoquant.measure.ranks.ranks import ALONE, ProcessGroup, Ranks

_TO_MEET = timedelta(minutes=10)
"""A process waits so long for the others to start."""
_FOR_EVER = timedelta(days=30)
"""Followers wait while the leader exports."""

_TOLD = "autoquant/lost"
"""Counts, in the launcher's store, the processes that noticed that another one has ended."""


@contextmanager
def process_group() -> Iterator[Ranks]:
    """The ranks of this process: those of `torchrun`, or of a group that is there already.

    Raises:
        RankLost: the others cannot be reached, or one of them has ended.
    """
    from torch import distributed

    is_there = distributed.is_available() and distributed.is_initialized()
    if not (is_there or is_launched()):
        yield ALONE
        return
    if is_there:
        with _joined() as ranks:
            yield ranks
        return
    try:
        distributed.init_process_group("gloo", timeout=_TO_MEET)
    except (RuntimeError, ValueError) as error:
        raise RankLost.because(str(error).partition("\n")[0]) from error
    try:
        with _terminated_as_lost(), _joined() as ranks:
            yield ranks
    finally:
        distributed.destroy_process_group()


def is_launched() -> bool:
    """Whether a launcher such as `torchrun` has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


def is_follower() -> bool:
    """Whether a launcher has started this process, and another one tells what comes of it."""
    return is_launched() and int(os.environ.get("RANK", "0")) > 0


@contextmanager
def _joined() -> Iterator[Ranks]:
    """A group of gloo with all ranks of the default group."""
    from torch import distributed

    if distributed.get_world_size() == 1:
        yield ALONE
        return
    ranks = ProcessGroup(distributed.new_group(backend="gloo", timeout=_FOR_EVER))
    try:
        yield ranks
    except RankLost as error:
        error.is_first = _is_first()
        raise
    except Exception:
        ranks.close()
        raise
    ranks.close()


@contextmanager
def _terminated_as_lost() -> Iterator[None]:
    """SIGTERM, which a launcher sends when another process has ended, raises `RankLost` inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def lost(number: int, frame: FrameType | None) -> None:
        raise RankLost.because("the launcher ends this one (SIGTERM)")

    before: Any = signal.signal(signal.SIGTERM, lost)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_first() -> bool:
    """Whether this process is the first to notice, or the one to tell that the leader has ended,
    which may have kept the store.
    """
    from torch import distributed

    with suppress(Exception):
        store = distributed.distributed_c10d._get_default_store()
        return int(store.add(_TOLD, 1)) == 1
    return distributed.get_rank() == 1
