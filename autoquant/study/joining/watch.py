"""How long a worker waits for a storage, and for a search."""

import time
from collections.abc import Callable
from typing import TypeVar

from autoquant.errors import RunConflict
from autoquant.study.joining.link import Link
from autoquant.study.joining.worker import LEASE
from autoquant.study.mirror import ANSWERS_WITHIN, brief

PATIENCE = 600.0
"""Seconds that a worker waits for a search to begin, or to go on where it was killed."""

STANDSTILL = 30.0
"""Seconds of a wait of `INTERVAL` after which the process itself did not run: it was stopped, or
the machine slept."""

_Found = TypeVar("_Found")


class Watch:
    """What a worker sees of a storage, until the storage or the search is gone for too long.

    Args:
        exchange: with the storage.
        note: is told what happens to the worker.
    """

    def __init__(
        self, exchange: Callable[[], None], note: Callable[[str], None] = lambda _: None
    ) -> None:
        self._link, self._note = Link(exchange), note
        self._heard = time.monotonic()
        """When a search was heard of last."""

    def _wait(self, look: Callable[[], _Found | None]) -> _Found | None:
        """What `look` finds; None once the search has ended.

        Raises:
            RunConflict: the storage does not answer, or no search is heard of.
        """
        with self._link.changed:
            while True:
                if (found := look()) is not None:
                    return found
                if self._has_ended():
                    return None
                self._require_life()
                if (seconds := self._link.wait()) > STANDSTILL:
                    self._resume(seconds)

    def _resume(self, seconds: float) -> None:
        """Go on after a standstill, in which neither storage nor search were asked."""
        self._link.forgive()
        self._heard = time.monotonic()
        lost = " The search took it for lost, and may ask it again." if seconds > LEASE else ""
        self._note(f"this process stood still for {seconds:.0f} seconds, and goes on.{lost}")

    def _has_ended(self) -> bool:
        return False

    def _require_life(self) -> None:
        again = "the same command joins again."
        if self._link.silence() > ANSWERS_WITHIN:
            error = self._link.error
            why = "" if error is None else f": {type(error).__name__}: {brief(error)}"
            raise RunConflict(
                f"the study's storage has not answered for {ANSWERS_WITHIN:.0f} seconds{why}",
                fix=f"start it; {again}",
            )
        if time.monotonic() - self._heard > PATIENCE:
            raise RunConflict(
                f"no search with these settings was heard of in the study's storage for "
                f"{PATIENCE:.0f} seconds.",
                fix="start the search, if it has not ended, with --study-storage and "
                f"--trials-at-once above 1; {again}",
            )
