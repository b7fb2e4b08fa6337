"""What a search tells whoever watches it."""

from typing import Protocol

from autoquant.progress import Progress, Unit
from autoquant.search.trials import Trial


class Observer(Progress, Protocol):
    """Receives progress and trials; no method changes the search."""

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """A candidate was measured; `best` keeps the budget."""


class Silent:
    """Watches nothing."""

    def stage(self, name: str, steps: int, unit: Unit = Unit.STEPS) -> None:
        """Do nothing."""

    def step(self, count: int = 1) -> None:
        """Do nothing."""

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Do nothing."""

    def warn(self, message: str) -> None:
        """Do nothing."""
