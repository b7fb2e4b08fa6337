"""An evaluator that hands whole requests to workers beside this process.

A measurement rests on its request alone, and measurements are told in the order of their requests.
So they depend neither on the number of workers, nor on who measures what, nor on who is first.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from autoquant.errors import AutoQuantError
from autoquant.measure.evaluator import Evaluator, Measurement, Request
from autoquant.plan.assignment import Assignment

Outcome = Sequence[Measurement] | Exception
"""What a task came to."""


class WorkerLost(AutoQuantError):
    """A worker has ended, and what it was asked for is not measured."""


class Worker(Protocol):
    """Measures elsewhere what it is asked for."""

    def start(self) -> None:
        """Return when it can measure.

        Raises:
            WorkerLost: it has ended.
            AutoQuantError: what keeps it from measuring.
        """

    def measure(self, requests: Sequence[Request]) -> Sequence[Measurement]:
        """The measurements of the requests.

        Raises:
            WorkerLost: it has ended.
            Exception: what the measurement has raised there.
        """

    def close(self) -> None:
        """End it at once, from any thread and more than once; what it does then is lost."""


@dataclass(slots=True, eq=False)
class _Task:
    """Requests that are measured together, by whoever takes them."""

    requests: Sequence[Request]
    outcome: Outcome | None = None


class WorkerPool:
    """Measures in this process and in workers beside it.

    The requests of a call are split evenly, so that those of one worker go through the blocks
    together. Workers start at the first call, one after the other, so that each sees what memory
    the others left. This process measures meanwhile. Requests of a worker that has ended are taken
    by the others. Use it as a context, which ends the workers.

    Args:
        own: measures in this process.
        workers: those beside it.
        warn: told of a worker that has ended.
        newcomers: asked at each call for workers that have come since.
    """

    def __init__(
        self,
        own: Evaluator,
        workers: Sequence[Worker],
        *,
        warn: Callable[[str], None],
        newcomers: Callable[[], Sequence[Worker]] = tuple,
    ) -> None:
        self._own, self._warn, self._newcomers = own, warn, newcomers
        self._workers: list[Worker] = []
        self._coming = [*workers]
        """Workers that have not been started."""
        self._changed = threading.Condition()
        self._starting = threading.Lock()
        self._todo: deque[_Task] = deque()
        self._lost: list[WorkerLost] = []
        self._unable: Exception | None = None
        """Why a worker could not start."""
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.close()
        for thread in self._threads:
            thread.join()

    def measure(
        self, requests: Iterable[Request], coming: Sequence[Assignment] = ()
    ) -> Iterator[Measurement]:
        """The measurements, in the order of the requests.

        Args:
            requests: what is asked for.
            coming: of use to this process as long as it is alone.

        Raises:
            AutoQuantError: what keeps a worker from measuring.
            Exception: what a measurement has raised, in its place.
        """
        self._start()
        serving = sum(thread.is_alive() for thread in self._threads)
        tasks = [_Task(share) for share in _shares([*requests], 1 + serving)]
        self._add(tasks)
        try:
            for task in tasks:
                yield from self._finished(task, () if serving else coming)
        finally:
            self._withdraw(tasks)

    def _start(self) -> None:
        """Start the workers that have come since the last call."""
        for worker in (*self._coming, *self._newcomers()):
            thread = threading.Thread(target=self._serve, args=(worker,), daemon=True)
            self._workers.append(worker)
            self._threads.append(thread)
            thread.start()
        self._coming = []

    def _finished(self, task: _Task, coming: Sequence[Assignment]) -> Sequence[Measurement]:
        """The measurements of a task; until they are there, this process measures too."""
        while (mine := self._taken(until=task)) is not None:
            self._put(mine, _outcome(lambda asked: self._own_measure(asked, coming), mine.requests))
        self._tell()
        if self._unable is not None:
            raise self._unable
        assert task.outcome is not None
        if isinstance(task.outcome, Exception):
            raise task.outcome
        return task.outcome

    def _own_measure(
        self, requests: Sequence[Request], coming: Sequence[Assignment]
    ) -> Sequence[Measurement]:
        return [*self._own.measure(requests, coming)]

    def _serve(self, worker: Worker) -> None:
        """Let a worker measure until the pool is closed or the worker lost."""
        try:
            with self._starting:
                if self._is_closed:
                    return
                worker.start()
            while (task := self._taken()) is not None:
                try:
                    outcome = _outcome(worker.measure, task.requests)
                except WorkerLost:
                    self._add([task], first=True)
                    raise
                self._put(task, outcome)
        except WorkerLost as lost:
            with self._changed:
                if not self._is_closed:
                    self._lost.append(lost)
        except Exception as error:  # of a model's code, too
            with self._changed:
                self._unable = error
                self._changed.notify_all()

    def _taken(self, until: _Task | None = None) -> _Task | None:
        """The next task, when there is one; None when there is nothing more to wait for."""
        with self._changed:
            while True:
                is_over = self._is_closed or self._unable is not None
                if is_over or (until is not None and until.outcome is not None):
                    return None
                if self._todo:
                    return self._todo.popleft()
                self._changed.wait()

    def _add(self, tasks: Sequence[_Task], *, first: bool = False) -> None:
        with self._changed:
            if first:
                self._todo.extendleft(tasks)
            else:
                self._todo.extend(tasks)
            self._changed.notify_all()

    def _put(self, task: _Task, outcome: Outcome) -> None:
        with self._changed:
            task.outcome = outcome
            self._changed.notify_all()

    def _withdraw(self, tasks: Sequence[_Task]) -> None:
        """Ask nobody any more for what nobody waits for."""
        with self._changed:
            self._todo = deque(task for task in self._todo if task not in tasks)

    def _tell(self) -> None:
        """Say once of each worker that it has ended."""
        with self._changed:
            lost, self._lost = self._lost, []
        for error in lost:
            self._warn(f"{error.message} What it measured is measured again by the others.")


def _shares(requests: Sequence[Request], count: int) -> Iterator[Sequence[Request]]:
    """Neighbours for each of so many, none for those that are left without."""
    size, more = divmod(len(requests), count)
    ends = [size * number + min(number, more) for number in range(count + 1)]
    return (requests[a:b] for a, b in pairwise(ends) if a < b)


def _outcome(
    measure: Callable[[Sequence[Request]], Sequence[Measurement]], requests: Sequence[Request]
) -> Outcome:
    """What a measurement gives or raises; `WorkerLost` is neither."""
    try:
        return measure(requests)
    except WorkerLost:
        raise
    except Exception as error:  # of a model's code, too
        return error
