"""What a search tells whoever records it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from autoquant.plan.assignment import Assignment

ChildRuns = Literal["all", "best", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """What is recorded of one measured candidate."""

    number: int
    origin: str
    """Who proposed it: `baseline: uniform fp8`."""
    kl: float
    """Nats per token."""
    bpe: float
    fits: bool
    """Whether it is within the budget; baselines need not be."""
    seconds: float
    assignment: Assignment


class Tracker(Protocol):
    """Where a search is recorded. No method raises."""

    def dataset(self, name: str, *, digest: str, context: str, tokens: int) -> None:
        """Record the tokens of one split; `context` is `calibration`, `search` or `report`."""

    def trial(self, record: TrialRecord) -> None:
        """Record a trial; what an earlier process recorded of it is not sent again."""

    def result(self, result: Mapping[str, Any]) -> None:
        """Record the contents of `result.json`, and its checkpoint if there is one."""


class NullTracker:
    """Records nothing."""

    def dataset(self, name: str, *, digest: str, context: str, tokens: int) -> None:
        """Do nothing."""

    def trial(self, record: TrialRecord) -> None:
        """Do nothing."""

    def result(self, result: Mapping[str, Any]) -> None:
        """Do nothing."""
