"""What ends the refinement besides its number of trials."""

from collections.abc import Callable
from dataclasses import dataclass

from autoquant.search.history import History


@dataclass(frozen=True, slots=True)
class Bounds:
    """Time and tokens of the refinement."""

    in_time: Callable[[], bool]
    max_tokens: int | None = None
    """Most tokens of all trials together; the trial that reaches it is the last."""

    def allow(self, history: History) -> bool:
        """Whether another trial may begin."""
        if self.max_tokens is not None and history.tokens >= self.max_tokens:
            return False
        return self.in_time()
