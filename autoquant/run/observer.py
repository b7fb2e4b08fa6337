"""What a search tells whoever watches it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from autoquant.progress import Progress, Unit
from autoquant.search.trials import Trial

log = logging.getLogger("autoquant")


class Observer(Progress, Protocol):
    """Receives progress and trials; no method changes the search."""

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """A candidate was measured; `best` keeps the budget."""


class Logged:
    """Writes to the logger `autoquant`: warnings as such, stages, trials and notes as INFO.

    Python prints the warnings of a program that sets up no logging to standard error, and nothing
    below them.
    """

    def stage(self, name: str, steps: int, unit: Unit = Unit.STEPS) -> None:
        """Log that the stage begins."""
        log.info("%s: %d %s", name, steps, unit)

    def step(self, count: int = 1) -> None:
        """Log nothing."""

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """Log the trial and the best KL so far."""
        log.info(
            "trial %d: kl=%.5f bpe=%.3f best=%.5f (%s: %s)",
            trial.number,
            trial.kl,
            trial.bpe,
            float("nan") if best is None else best.kl,
            trial.stage,
            trial.name,
        )

    def note(self, message: str) -> None:
        """Log it as INFO."""
        log.info("%s", message)

    def warn(self, message: str) -> None:
        """Log it as a warning."""
        log.warning("%s", message)


@contextmanager
def or_warn(target: Path | str, observer: Progress) -> Iterator[None]:
    """Go on without a file that no result rests on, where the block cannot write it."""
    try:
        yield
    except Exception as error:
        observer.warn(f"{target} could not be written: {type(error).__name__}: {error}")
