"""A search as seen on standard error: a live bar on a terminal, a line now and then otherwise."""

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from autoquant.cli.output import note, warn
from autoquant.report.words import duration
from autoquant.search.observer import Unit
from autoquant.search.trials import Trial

_LINES_PER_STAGE = 10
_SECONDS_PER_LINE = 60.0
"""Without a terminal, a stage says where it is at every tenth of it and every minute."""


@dataclass(kw_only=True)
class _Stage:
    name: str
    steps: int
    unit: Unit
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    line_at: float = field(default_factory=time.monotonic)
    """When the last line was printed."""

    def advance(self, count: int) -> bool:
        """Count steps; whether a line is due."""
        before, self.done = self._tenths(), self.done + count
        now = time.monotonic()
        if self._tenths() == before and now - self.line_at < _SECONDS_PER_LINE:
            return False
        self.line_at = now
        return self.steps >= _LINES_PER_STAGE

    def amount(self) -> str:
        """`12/40`, or `1.2/4.0 GB`."""
        if self.unit is Unit.BYTES:
            return f"{self.done / 1e9:.1f}/{self.steps / 1e9:.1f} GB"
        return f"{self.done}/{self.steps}"

    def left(self) -> str:
        """The time that the rest will take at the pace so far."""
        passed = time.monotonic() - self.started
        rest = max(0, self.steps - self.done)
        return f", {duration(passed * rest / self.done)} left" if rest and self.done else ""

    def _tenths(self) -> int:
        return self.done * _LINES_PER_STAGE // max(1, self.steps)


class Terminal:
    """An `Observer` that writes to standard error."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._stage = _Stage(name="", steps=0, unit=Unit.STEPS)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def stage(self, name: str, steps: int, unit: Unit = Unit.STEPS) -> None:
        """Begin a bar, or say that the stage begins."""
        self._stage = _Stage(name=name, steps=steps, unit=unit)
        if self._live:
            self._task = self._progress.add_task(
                name, total=steps, status="", amount=self._stage.amount()
            )
        else:
            note(f"{name}: {steps} steps" if unit is Unit.STEPS and steps > 1 else name)

    def step(self, count: int = 1) -> None:
        """Advance the bar; without a terminal, say so at every tenth and every minute."""
        is_due = self._stage.advance(count)
        if self._live:
            self._update()
        elif is_due:
            note(f"{self._stage.name} {self._stage.amount()}{self._stage.left()}")

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """Show the trial and the best candidate that keeps the budget."""
        lead = f"best={best.kl:.5f} bpe={best.bpe:.3f}" if best is not None else "none fits yet"
        self._stage.advance(1)
        if self._live:
            self._update(status=lead)
        else:
            note(
                f"trial {trial.number:3d}  kl={trial.kl:.5f} +-{trial.stderr:.5f} "
                f"bpe={trial.bpe:.3f}{'' if trial.fits else ' (over budget)'}  {lead}  "
                f"{trial.seconds:.1f}s  {trial.stage}: {trial.name}"
            )

    def note(self, message: str) -> None:
        """Print a line above the bar."""
        note(message)

    def warn(self, message: str) -> None:
        """Print a warning above the bar."""
        warn(message)

    def _update(self, **fields: str) -> None:
        if self._task is not None:
            stage = self._stage
            self._progress.update(self._task, completed=stage.done, amount=stage.amount(), **fields)
