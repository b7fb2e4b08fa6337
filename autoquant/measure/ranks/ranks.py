"""Processes that share the batches of a measurement: one that leads, and others that follow.

Every rank has the whole model, or brings its blocks by itself. A batch is dealt to one rank as a
whole, so that products keep their shapes, and results are put together in the order of the batches:
they do not depend on the number of ranks. What goes between ranks are small objects, through gloo.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from autoquant.errors import RankLost, first_line

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Ranks:
    """This process alone; nothing is sent anywhere."""

    number = 0
    size = 1
    failure: Exception | None = None
    """The last exception that `all_of` has raised, on every rank."""

    @property
    def is_leader(self) -> bool:
        """Whether this process decides, writes and reports."""
        return self.number == 0

    def dealt(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """The items of this rank, every `size`-th."""
        return items[self.number :: self.size]

    def gathered(self, work: Callable[[], Sequence[_Result]]) -> list[_Result]:
        """What all ranks make of the items dealt to them, in the order of the items.

        Args:
            work: makes this rank's; an exception of any rank is raised on all of them.
        """
        by_rank = self.all_of(lambda: [*work()])
        longest = max(map(len, by_rank))
        return [own[i] for i in range(longest) for own in by_rank if i < len(own)]

    def all_of(self, work: Callable[[], _Result]) -> list[_Result]:
        """What each rank makes, in the order of the ranks; an exception of any is raised on all."""
        return [work()]

    def own(self, work: Callable[[], _Result]) -> _Result:
        """What this rank makes, which stays here; an exception of any rank is raised on all."""
        made: list[_Result] = []
        self.all_of(lambda: made.append(work()))
        return made[0]

    def leader_first(self, work: Callable[[], None]) -> None:
        """Do on every rank what the leader leaves behind for those who see its files."""
        self.own(lambda: work() if self.is_leader else None)
        self.own(lambda: None if self.is_leader else work())

    def announce(self, task: Any) -> None:
        """Tell the followers what comes next."""

    def next_task(self) -> Any:
        """What the leader announces."""
        raise NotImplementedError


ALONE = Ranks()
"""Of a process without others."""


class ProcessGroup(Ranks):
    """The ranks of `torch.distributed`; `process_group` makes one.

    Args:
        group: of gloo, with all ranks in it.
    """

    def __init__(self, group: Any) -> None:
        from torch import distributed

        self._group = group
        self.number = distributed.get_rank()
        self.size = distributed.get_world_size()
        self._depth = 0

    def all_of(self, work: Callable[[], _Result]) -> list[_Result]:
        """What each rank makes; an exception of any is raised on all, the first rank's first.

        Calls may be nested: a rank that fails outside of an inner one waits there for the others,
        which fail inside of it.

        Raises:
            RankLost: a process has ended.
        """
        own: tuple[_Result | None, Exception | None]
        self._depth += 1
        try:
            own = work(), None
        except RankLost:
            raise
        except Exception as error:  # of a model's code, too
            own = None, sendable(error)
        finally:
            self._depth -= 1
        while True:
            found = self._gather((self._depth, *own))
            self.failure = next((failed for _, _, failed in found if failed is not None), None)
            deepest = max(depth for depth, _, _ in found)
            if self.failure is None and any(depth != deepest for depth, _, _ in found):
                self.failure = RuntimeError("processes have gone different ways")
            if self._depth == deepest:
                break
        if self.failure is not None:
            raise self.failure
        return [result for _, result, _ in found]

    def _gather(self, own: Any) -> list[Any]:
        from torch import distributed

        found: list[Any] = [None] * self.size
        with _losses():
            distributed.all_gather_object(found, own, group=self._group)
        return found

    def close(self) -> None:
        """End the group's threads, which wait for nobody any more.

        One of them may still hold the tensors of the last exchange. If it lets go of them while the
        interpreter ends, the process aborts.
        """
        from torch import distributed

        distributed.destroy_process_group(self._group)
        del self._group

    def announce(self, task: Any) -> None:
        """Tell the followers what comes next; only the leader does.

        Raises:
            RankLost: a process has ended.
        """
        self._broadcast(task)

    def next_task(self) -> Any:
        """What the leader announces.

        Raises:
            RankLost: a process has ended.
        """
        return self._broadcast(None)

    def _broadcast(self, task: Any) -> Any:
        from torch import distributed

        sent = [task]
        with _losses():
            distributed.broadcast_object_list(sent, src=0, group=self._group)
        return sent[0]


def sendable(error: Exception) -> Exception:
    """The exception itself, or what it says where it cannot be sent."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling runs the exception's own code
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _losses() -> Iterator[None]:
    """What gloo says of a connection that ended, as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost.because(first_line(error)) from error
