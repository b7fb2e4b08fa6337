"""Functions that all ranks run at the same time, with the same arguments."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from autoquant.errors import RankLost
from autoquant.measure.ranks.ranks import Ranks, sendable

OF_THE_LEADER = "raised by process 0, which tells of it"
"""A note of exceptions that followers raise because the leader has."""


class Measurer(Protocol):
    """What measures on one rank."""

    ranks: Ranks


_M = TypeVar("_M", bound=Measurer)
_P = ParamSpec("_P")
_R = TypeVar("_R")
_TASKS: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True, slots=True)
class _Task:
    """What all ranks do next."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _End:
    """What came of it all."""

    result: Any = None
    error: Exception | None = None


def together(
    function: Callable[Concatenate[_M, _P], _R],
) -> Callable[Concatenate[_M, _P], _R]:
    """Let a call on the leader be one on every rank, each with its own model.

    Arguments are sent, so that they have to be plain data; a callback by keyword stays with the
    leader. What can fail on one rank alone belongs into `Ranks.gathered` or `Ranks.all_of`, which
    raise it on all.
    """
    _TASKS[function.__qualname__] = function

    @wraps(function)
    def call(measurer: _M, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        sent = {name: value for name, value in kwargs.items() if not callable(value)}
        measurer.ranks.announce(_Task(function.__qualname__, args, sent))
        return function(measurer, *args, **kwargs)

    return call


def announce_step(ranks: Ranks, name: str, *args: Any) -> None:
    """Let the followers take a step of theirs that makes them able to measure, as the leader does
    now.
    """
    ranks.announce(_Task(name, args))


def follow(ranks: Ranks, steps: Mapping[str, Callable[..., Measurer | None]]) -> Any:
    """Run what the leader announces until it says that all is done.

    Args:
        ranks: of this process, which is not the leader.
        steps: what comes before measuring, by its name; one of them makes the measurer.

    Returns:
        What the leader says at the end.

    Raises:
        RankLost: a process has ended.
        Exception: what ended the leader, with the note `OF_THE_LEADER`; or what ended this rank
            alone, which ends the others.
    """
    measurer: Measurer | None = None
    while True:
        task = ranks.next_task()
        if isinstance(task, _End):
            ranks.all_of(lambda: None)
            if task.error is not None:
                task.error.add_note(OF_THE_LEADER)
                raise task.error
            return task.result
        try:
            if task.name in steps:
                measurer = steps[task.name](*task.args) or measurer
            else:
                _TASKS[task.name](measurer, *task.args, **task.kwargs)
        except Exception as error:
            if error is not ranks.failure:  # else the leader has the same one, and decides
                raise


def lead(ranks: Ranks, work: Callable[[], _R]) -> _R:
    """Do the leader's work; the followers hear what comes of it, and end with it.

    An interruption is told by the end of the connection.
    """
    try:
        result = work()
    except RankLost:
        raise
    except Exception as error:
        _dismiss(ranks, _End(error=sendable(error)))
        raise
    _dismiss(ranks, _End(result))
    return result


def _dismiss(ranks: Ranks, end: _End) -> None:
    """Tell the followers that all is done; those that are gone know."""
    with suppress(RankLost):
        ranks.announce(end)
        ranks.all_of(lambda: None)  # no connection is closed before all have heard it
