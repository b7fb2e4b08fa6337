"""What a harness has found, in a file from which a run that was cut short goes on."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from events import Ended


@dataclass(slots=True)
class Figures:
    """What every harness notes of the commands that it runs."""

    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """Of the command that took the most processor time."""
    megabytes: int = 0
    """Of the largest command, and what this process has loaded for it."""

    @classmethod
    def read(cls, state: Path | None) -> Self:
        """Those of an earlier run that was cut short; none without."""
        if state is None or not state.exists():
            return cls()
        return cls(**json.loads(state.read_text()))

    def write(self, state: Path | None) -> None:
        """Keep them for a run that goes on from here."""
        if state is not None:
            unfinished = state.with_suffix(".new")
            unfinished.write_text(json.dumps(asdict(self), indent=2))
            unfinished.replace(state)

    def add(self, ended: Ended) -> None:
        """Note how long and how large a command was."""
        self.seconds = max(self.seconds, ended.seconds)
        self.megabytes = max(self.megabytes, ended.megabytes)
