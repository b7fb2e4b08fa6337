"""How long work tells whoever watches that it goes on."""

from enum import StrEnum
from typing import Protocol


class Unit(StrEnum):
    """What the steps of a stage are."""

    STEPS = "steps"
    BYTES = "bytes"


class Progress(Protocol):
    """Receives progress; no method changes the work."""

    def stage(self, name: str, steps: int, unit: Unit = Unit.STEPS) -> None:
        """A stage of `steps` steps begins."""

    def step(self, count: int = 1) -> None:
        """So many steps of the stage are done."""

    def note(self, message: str) -> None:
        """Something the user should know."""

    def warn(self, message: str) -> None:
        """Something that may be wrong without ending the work."""


class Silent:
    """Nobody watches: another process tells."""

    def stage(self, name: str, steps: int, unit: Unit = Unit.STEPS) -> None: ...

    def step(self, count: int = 1) -> None: ...

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...
