"""What a search tells whoever watches it."""

from enum import StrEnum
from typing import Protocol

from autoquant.search.trials import Trial


class Unit(StrEnum):
    """What the steps of a stage are."""

    STEPS = "steps"
    BYTES = "bytes"


class Observer(Protocol):
    """Receives progress; no method changes the search."""

    def stage(self, name: str, steps: int, unit: Unit = Unit.STEPS) -> None:
        """A stage of `steps` steps begins."""

    def step(self, count: int = 1) -> None:
        """So many steps of the stage are done."""

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """A candidate was measured; `best` keeps the budget."""

    def note(self, message: str) -> None:
        """Something the user should know."""

    def warn(self, message: str) -> None:
        """Something that may be wrong without ending the search."""


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
