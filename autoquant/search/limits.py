"""What ends the refinement besides its number of trials."""

from collections.abc import Callable
from dataclasses import dataclass

from autoquant.plan.assignment import Assignment
from autoquant.search.trials import Ledger


@dataclass(frozen=True, slots=True)
class Bounds:
    """Time and tokens of the refinement."""

    in_time: Callable[[], bool]
    max_tokens: int | None = None
    """Most tokens of all trials together; the trial that reaches it is the last."""

    def allow(self, ledger: Ledger, assignment: Assignment) -> bool:
        """Whether `assignment` may be asked for: it costs nothing, or there is time left for it."""
        if ledger.has(assignment):
            return True
        if self.max_tokens is not None and ledger.tokens >= self.max_tokens:
            return False
        return ledger.is_measured(assignment) or self.in_time()
