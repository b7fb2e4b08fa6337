"""A worker of another machine, as its search sees it."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from autoquant.measure.evaluator import Measurement, Request
from autoquant.measure.workers.pool import WorkerLost
from autoquant.study.joining.link import ANSWER, BEAT, Link, order_of

LEASE = 60.0
"""Seconds without a sign of life of a worker after which others measure what it was asked for."""


class JoinedWorker:
    """A worker of another machine, as the pool of a search sees it.

    Args:
        number: of its trial.
        host: where it runs.
        link: of the search.
        post: has an attribute of the study written.
    """

    def __init__(
        self, number: int, host: str, link: Link, post: Callable[[str, Any], None]
    ) -> None:
        self.title = f"Worker {number} ({host})"
        self.is_taken = False
        """Whether a pool hands it requests."""
        self._number, self._link, self._post = number, link, post
        self._beat: Any = None
        self._heard: float | None = None
        """When its beat changed last; None until it does."""
        self._order: str | None = None
        self._answer: Any = None
        self._has_left = False

    @property
    def is_there(self) -> bool:
        """Whether it was heard of, within the lease."""
        return (
            not self._has_left
            and self._heard is not None
            and time.monotonic() - self._heard <= LEASE
        )

    def hear(self, attributes: Mapping[str, Any] | None) -> None:
        """Take in the attributes of its trial; None where that has ended.

        A beat at another order than the one that it was given is no sign of life: somebody else
        has given it that.
        """
        if attributes is None:
            self._has_left = True
            return
        beat = attributes.get(BEAT)
        if self._beat not in (None, beat) and self._order in (None, _place(beat)):
            self._heard = time.monotonic()
        self._beat, self._answer = beat, attributes.get(ANSWER)

    def start(self) -> None:
        """It has started by itself."""

    def measure(self, requests: Sequence[Request]) -> Sequence[Measurement]:
        """The measurements of the requests.

        Raises:
            WorkerLost: it has left, gives no sign of life, or answers something else.
        """
        with self._link.changed:
            try:
                return self._measured(requests)
            except WorkerLost:
                self.is_taken = False
                raise
            finally:
                self._order = None

    def _measured(self, requests: Sequence[Request]) -> Sequence[Measurement]:
        self._order = uuid4().hex
        asked = {"id": self._order, "requests": [request.to_dict() for request in requests]}
        self._post(order_of(self._number), asked)
        while not self._has_answered():
            self._require_life()
            self._link.wait()
        try:
            found = [Measurement.from_dict(each) for each in self._answer["measurements"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._lost("has answered what is no measurement") from error
        if len(found) != len(requests):
            raise self._lost(f"has answered {len(found)} of {len(requests)} requests")
        return found

    def _has_answered(self) -> bool:
        return isinstance(self._answer, Mapping) and self._answer.get("id") == self._order

    def close(self) -> None:
        """Ask it for no more; it stays for another pool."""
        with self._link.changed:
            self.is_taken = False
            self._link.changed.notify_all()

    def _require_life(self) -> None:
        if not self.is_taken:
            raise self._lost("is asked no more")
        if self._has_left:
            raise self._lost("has left")
        if not self.is_there:
            raise self._lost(f"has given no sign of life for {LEASE:.0f} seconds")

    def _lost(self, how: str) -> WorkerLost:
        return WorkerLost(f"{self.title} {how}.", fix="it may join again by the same command.")


def _place(beat: Any) -> Any:
    """The order that a worker is at."""
    return beat[0] if isinstance(beat, list) and beat else None
