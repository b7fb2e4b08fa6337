"""What searches of one model under different budgets have in common."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from autoquant.rundir import (
    CALIBRATION,
    INTERACTIONS,
    SENSITIVITY,
    SENSITIVITY_LOG,
    SPLITS,
    TRIALS,
    RunDirectory,
    read_records,
)
from autoquant.scoring.kl import TokenScores
from autoquant.search.session import Session
from autoquant.search.trials import Trial

PROBES = (SPLITS, CALIBRATION, SENSITIVITY_LOG, SENSITIVITY)


@dataclass
class Shared:
    """The live model and the runs before this one; empty for a search of its own."""

    session: Session | None = None
    runs: list[Path] = field(default_factory=list)
    """Finished run directories with the same model, space, tokens and seed."""
    confirmed: dict[str, TokenScores] = field(default_factory=dict)
    """Scores on the report split by assignment digest."""

    def adopt_probes(self, run: RunDirectory) -> None:
        """Copy an earlier run's probes into a run that has none."""
        if not self.runs or run.read_json(SENSITIVITY) is not None:
            return
        donor = self.runs[0]
        if (donor / INTERACTIONS).is_dir():
            shutil.copytree(donor / INTERACTIONS, run.path / INTERACTIONS, dirs_exist_ok=True)
        for name in PROBES:
            run.write_text(name, (donor / name).read_text(encoding="utf-8"))

    def trials(self) -> Iterator[Trial]:
        """What earlier runs measured to the end on the same search tokens."""
        for path in self.runs:
            for record in read_records(path, TRIALS):
                trial = Trial.from_dict(record)
                if not trial.is_stopped:
                    yield trial
