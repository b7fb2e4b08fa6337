"""A process's end of a study in a storage, and the names of what the processes write there.

The study has one running trial for each worker. The search writes attributes of the study, a worker
those of its trial, and nobody else writes them. Values are replaced, so they take no more and more
room. Clocks are not compared: a process is there as long as its beat changes.
"""

import threading
import time
from collections.abc import Callable

SUFFIX = ", workers"
"""Of the name of the study, behind that of the search's own."""

ABOUT = "autoquant"
"""Attribute of the study: what a worker must have in common with the search."""
OFFER = "offer"
"""Attribute of the study: what a worker measures with; absent until the search has calibrated."""
BEAT = "beat"
"""Attribute of the study and of a worker's trial: a value that changes. A worker's names the order
that it is at."""
HOST = "host"
"""Attribute of a worker's trial: where it runs."""
ANSWER = "answer"
"""Attribute of a worker's trial: the measurements of one order."""


def order_of(number: int) -> str:
    """Attribute of the study: what the worker of a number is asked for."""
    return f"order {number}"


INTERVAL = 1.0
"""Seconds between two exchanges with the storage."""


class Link:
    """Repeats an exchange with a storage in a thread of its own.

    So a storage that fails or hangs holds up nobody, and a process is heard of while it measures.

    Args:
        exchange: reads and writes; what it raises is kept, and it is called again.
    """

    def __init__(self, exchange: Callable[[], None]) -> None:
        self.changed = threading.Condition()
        """Held to change what the exchange shares with other threads; notified after each."""
        self.error: Exception | None = None
        """What the last exchange raised."""
        self._exchange = exchange
        self._answered = time.monotonic()
        self._woken = threading.Event()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)  # may hang to the end

    def start(self) -> None:
        """Begin to exchange."""
        self._thread.start()

    def wake(self) -> None:
        """Exchange at once: there is something to write."""
        self._woken.set()

    def wait(self) -> float:
        """Return behind the next exchange, or when something else has changed; `changed` is held.

        A storage that hangs is not waited for.

        Returns:
            Seconds that it took: many more than `INTERVAL` where the process stood still.
        """
        before = time.monotonic()
        self.changed.wait(INTERVAL)
        return time.monotonic() - before

    def stop(self, within: float = 0.0) -> None:
        """End behind one more exchange, and wait so many seconds for it."""
        self._is_stopped = True
        self.wake()
        self._thread.join(within)

    def silence(self) -> float:
        """Seconds since the storage answered."""
        return time.monotonic() - self._answered

    def forgive(self) -> None:
        """Count the storage's silence from now on: nobody has asked it."""
        self._answered = time.monotonic()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._is_stopped
            self._woken.clear()
            error = self._attempt()
            with self.changed:
                self.error = error
                self.changed.notify_all()
            self._woken.wait(0 if is_last else INTERVAL)

    def _attempt(self) -> Exception | None:
        try:
            self._exchange()
        except Exception as error:  # each kind of storage has errors of its own
            return error
        self._answered = time.monotonic()
        return None
