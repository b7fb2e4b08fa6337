"""A search as seen on standard error: a live table on a terminal, a line now and then otherwise."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from autoquant.cli.output import note
from autoquant.errors import one_line
from autoquant.progress import Unit
from autoquant.report.words import duration, size
from autoquant.search.trials import Trial

_LINES_PER_STAGE = 10
_SECONDS_PER_LINE = 60.0
"""Without a terminal, a stage says where it is at every tenth of it, if it has ten steps, and at
the first step after every minute."""


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
        is_at_tenth = self.steps >= _LINES_PER_STAGE and self._tenths() > before
        if not is_at_tenth and now - self.line_at < _SECONDS_PER_LINE:
            return False
        self.line_at = now
        return True

    def amount(self) -> str:
        """`12/40`, or `1.20 GB/4.00 GB`."""
        if self.unit is Unit.BYTES:
            return f"{size(self.done)}/{size(self.steps)}"
        return f"{self.done}/{self.steps}"

    def left(self) -> str:
        """The time that the rest will take at the pace so far."""
        passed = time.monotonic() - self.started
        rest = max(0, self.steps - self.done)
        return f", {duration(passed * rest / self.done)} left" if rest and self.done else ""

    def _tenths(self) -> int:
        return self.done * _LINES_PER_STAGE // max(1, self.steps)


class _Stages(Progress):
    """A row for each stage under a header, and the trial measured last below."""

    HEADER = ("stage", "", "done", "time", "left", "best KL", "BPE")

    def __init__(self, console: Console) -> None:
        self.last = ""
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[amount]}", justify="right"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[kl]}", justify="right"),
            TextColumn("{task.fields[bpe]}", justify="right"),
            console=console,
        )

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        table = super().make_tasks_table(tasks)
        for column, name in zip(table.columns, self.HEADER, strict=True):
            column.header = Text(name, style="bold")
        table.show_header = True
        return table

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.tasks:
            yield from super().get_renderables()
        if self.last:
            yield Text(self.last, style="dim", no_wrap=True, overflow="ellipsis")


class Terminal:
    """An `Observer` that writes to standard error."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        is_live = console.is_terminal and not console.is_dumb_terminal
        self._stages = _Stages(console) if is_live else None
        self._rows: dict[str, TaskID] = {}
        self._stage = _Stage(name="", steps=0, unit=Unit.STEPS)

    def __enter__(self) -> Self:
        if self._stages is not None:
            self._stages.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stages is not None:
            self._stages.last = ""
            if kind is None:
                self._end_stage()
            self._stages.stop()

    def stage(self, name: str, steps: int, unit: Unit = Unit.STEPS) -> None:
        """Begin a row of the table, or say that the stage begins."""
        self._end_stage()
        self._stage = _Stage(name=name, steps=steps, unit=unit)
        if self._stages is None:
            note(f"{name}: {steps} steps" if unit is Unit.STEPS and steps > 1 else name)
            return
        if steps == 0:
            return
        if name in self._rows:  # the search of the next budget begins a table of its own
            self._stages.stop()
            self._stages = _Stages(self._stages.console)
            self._stages.start()
            self._rows.clear()
        self._rows[name] = self._stages.add_task(
            name, total=steps, amount=self._stage.amount(), kl="", bpe=""
        )

    def step(self, count: int = 1) -> None:
        """Advance the row; without a terminal, say so at every tenth and every minute."""
        is_due = self._stage.advance(count)
        if self._stages is not None:
            self._show()
        elif is_due:
            note(f"{self._stage.name} {self._stage.amount()}{self._stage.left()}")

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """Show the trial and the best candidate that keeps the budget."""
        is_due = self._stage.advance(1)
        error = "" if math.isnan(trial.stderr) else f" +-{trial.stderr:.5f}"
        line = (
            f"trial {trial.number:3d}  kl={trial.kl:.5f}{error} bpe={trial.bpe:.3f}"
            f"{'' if trial.fits else ' (over budget)'}"
            f"{' (stopped early)' if trial.is_stopped else ''}"
        )
        origin = f"{trial.seconds:.1f}s  {trial.stage}: {trial.name}"
        if self._stages is not None:
            self._stages.last = f"{line}  {origin}"
            self._show(best)
            return
        lead = f"best={best.kl:.5f} bpe={best.bpe:.3f}" if best is not None else "none fits yet"
        note(f"{line}  {lead}  {origin}")
        if is_due:
            note(f"{self._stage.name} {self._stage.amount()}{self._stage.left()}")

    def note(self, message: str) -> None:
        """Print a line above the table."""
        self._say(message)

    def warn(self, message: str) -> None:
        """Print a warning above the table."""
        self._say(f"warning: {message}")

    def _say(self, line: str) -> None:
        """Print through the table where there is one: only it knows what it has to move."""
        line = one_line(line)
        if self._stages is None:
            note(line)
        else:
            self._stages.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _end_stage(self) -> None:
        """Stop the clock of the stage, which may have had no use for all of its steps."""
        row = self._rows.get(self._stage.name)
        if self._stages is not None and row is not None:
            self._stages.last = ""
            self._stages.update(row, total=self._stage.done, completed=self._stage.done)

    def _show(self, best: Trial | None = None) -> None:
        if self._stages is None or self._stage.name not in self._rows:
            return
        row = self._rows[self._stage.name]
        self._stages.update(row, completed=self._stage.done, amount=self._stage.amount())
        if best is not None:
            self._stages.update(row, kl=f"{best.kl:.5f}", bpe=f"{best.bpe:.3f}")
