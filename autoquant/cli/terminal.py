"""A search as seen on standard error: a live bar on a terminal, a line per trial otherwise."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from autoquant.cli.output import note, warn
from autoquant.search.trials import Trial

_LINES_PER_STAGE = 10
"""Progress lines of a stage without trials, where there is no terminal."""


class Terminal:
    """An `Observer` that writes to standard error."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._stage, self._steps, self._done = "", 0, 0

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

    def stage(self, name: str, steps: int) -> None:
        """Begin a bar, or say that the stage begins."""
        self._stage, self._steps, self._done = name, steps, 0
        if self._live:
            self._task = self._progress.add_task(name, total=steps, status="")
        else:
            note(f"{name}: {steps} steps" if steps > 1 else name)

    def step(self) -> None:
        """Advance the bar; without a terminal, say so ten times a stage."""
        self._done += 1
        if self._live and self._task is not None:
            self._progress.advance(self._task)
        elif self._steps >= _LINES_PER_STAGE and self._shares(self._done) > self._shares(
            self._done - 1
        ):
            note(f"{self._stage} {self._done}/{self._steps}")

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """Show the trial and the best candidate that keeps the budget."""
        lead = f"best={best.kl:.5f} bpe={best.bpe:.3f}" if best is not None else "none fits yet"
        if self._live and self._task is not None:
            self._progress.update(self._task, advance=1, status=lead)
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

    def _shares(self, done: int) -> int:
        return done * _LINES_PER_STAGE // max(1, self._steps)
