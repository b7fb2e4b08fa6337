"""A worker that is a process of this machine, and its side of the connection."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

from autoquant.measure.evaluator import Evaluator, Measurement, Request
from autoquant.measure.ranks.ranks import sendable
from autoquant.measure.workers.pool import WorkerLost

_GONE = (EOFError, OSError)
"""What a connection raises whose other end is closed."""


class ProcessWorker:
    """A process that runs `python -m PROGRAM`, which calls `serve`.

    Args:
        number: of the worker, from 1 on; 0 is this process.
        program: a module.
        order: what it makes its evaluator of; anything that can be pickled.
        environment: variables that it has besides those of this process.
    """

    def __init__(
        self, number: int, program: str, order: Any, environment: Mapping[str, str]
    ) -> None:
        self._number, self._program, self._order = number, program, order
        self._environment = os.environ | environment
        self._ending = threading.Lock()
        self._is_closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None

    def start(self) -> None:
        """Return when the process can measure.

        Raises:
            WorkerLost: it has ended.
            Exception: what keeps it from measuring.
        """
        with self._ending:
            if self._is_closed:
                raise self._lost("closed before it started")
            self._launch()
        self._answer(self._order)

    def measure(self, requests: Sequence[Request]) -> Sequence[Measurement]:
        """The measurements of the requests.

        Raises:
            WorkerLost: the process has ended.
            Exception: what the measurement has raised there.
        """
        measured: Sequence[Measurement] = self._answer(requests)
        return measured

    def close(self) -> None:
        """Kill the process, if it runs: all that it writes are whole files."""
        with self._ending:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def _launch(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._program, str(theirs.fileno())],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_descriptor() else subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # an interruption from the terminal is this process's to handle
            )

    def _answer(self, asked: Any) -> Any:
        assert self._connection is not None
        try:
            self._connection.send(asked)
            answer = self._connection.recv()
        except _GONE as error:
            raise self._lost(self._end()) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _end(self) -> str:
        """How the process has ended."""
        assert self._process is not None
        code = self._process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _lost(self, how: str) -> WorkerLost:
        return WorkerLost(
            f"Worker {self._number} has ended ({how}).",
            fix="the same command goes on where the search stopped.",
        )


def serve(descriptor: int, evaluator_of: Callable[[Any], Evaluator]) -> None:
    """Measure for the process at the other end until that ends or closes it.

    Args:
        descriptor: of the connection.
        evaluator_of: makes the evaluator of the order.
    """
    threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()
    with Connection(descriptor) as leader:
        try:
            evaluator = _made(leader, evaluator_of)
            while evaluator is not None:
                leader.send(_measured(evaluator, leader.recv()))
        except _GONE:
            return


def _made(
    leader: "Connection[Any, Any]", evaluator_of: Callable[[Any], Evaluator]
) -> Evaluator | None:
    order = leader.recv()
    try:
        evaluator = evaluator_of(order)
    except Exception as error:  # of a model's code, too
        leader.send(sendable(error))
        return None
    leader.send(None)
    return evaluator


def _measured(
    evaluator: Evaluator, requests: Sequence[Request]
) -> Sequence[Measurement] | Exception:
    try:
        return [*evaluator.measure(requests)]
    except Exception as error:  # of a model's code, too
        return sendable(error)


def _end_without(parent: int) -> None:
    """End this process when its parent has ended, in the middle of a measurement too."""
    waiting = threading.Event()
    while os.getppid() == parent:
        waiting.wait(1.0)
    os._exit(1)


def _has_descriptor() -> bool:
    """Whether standard error is a file, and not an object of a notebook or a test."""
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
