"""Two stages of a stream at the same time."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")


def ahead(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield `items` in order; a thread makes the next one while the last one is used.

    At most two items exist at a time. An error in making an item is raised in its place.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:

        def begin() -> Future[tuple[_Item, ...]]:
            return thread.submit(_next, iterator)

        pending = begin()
        while found := pending.result():
            pending = begin()
            yield found[0]
            del found


def _next(iterator: Iterator[_Item]) -> tuple[_Item, ...]:
    """The next item in a tuple of its own, or an empty tuple behind the last."""
    for item in iterator:
        return (item,)
    return ()
