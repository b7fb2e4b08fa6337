"""Large things that are kept while memory allows."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """Keeps values up to a limit, and beyond it those that were used last.

    What is kept stays: candidates ask for all groups in turn, and a cache that drops the value not
    used for longest would then never hold what is asked for next.

    Args:
        limit_bytes: for values that stay.
        recent_bytes: for the last ones beyond the limit; the very last is always there.
    """

    def __init__(self, limit_bytes: int, recent_bytes: int = 0) -> None:
        self.limit_bytes = limit_bytes
        self.recent_bytes = recent_bytes
        self._stay: dict[K, V] = {}
        self._stay_bytes = 0
        self._made: dict[K, int] = {}
        """Bytes of those of `_stay` that were made here."""
        self._recent: dict[K, tuple[V, int]] = {}

    def get(self, key: K, size: int, make: Callable[[], V]) -> V:
        """The value of `key`, made where it is absent.

        Args:
            key: names the value.
            size: its bytes.
            make: makes it, after what has to go has gone.
        """
        if key in self._stay:
            return self._stay[key]
        if key in self._recent:
            self._recent[key] = self._recent.pop(key)  # the last one used
            return self._recent[key][0]
        if self._stay_bytes + size <= self.limit_bytes:
            self._stay[key] = make()
            self._made[key] = size
            self._stay_bytes += size
            return self._stay[key]
        while self._recent and sum(b for _, b in self._recent.values()) + size > self.recent_bytes:
            del self._recent[next(iter(self._recent))]
        value = make()
        self._recent[key] = value, size
        return value

    def drop(self, is_stale: Callable[[K], bool]) -> None:
        """Forget the values of some keys, given ones aside."""
        for key in [own for own in self._made if is_stale(own)]:
            self._stay_bytes -= self._made.pop(key)
            del self._stay[key]
        for key in [own for own in self._recent if is_stale(own)]:
            del self._recent[key]

    def put(self, key: K, value: V) -> None:
        """Keep a given value, whatever the limit."""
        self._stay[key] = value
