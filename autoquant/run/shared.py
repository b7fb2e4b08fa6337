"""What searches of one model under different budgets have in common."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant.errors import ConfigError, RunConflict
from autoquant.files import link_files
from autoquant.measure.kl import TokenScores
from autoquant.measure.ranks.ranks import ALONE, Ranks
from autoquant.measure.session import Session
from autoquant.run.signature import probe_part
from autoquant.search.trials import Trial
from autoquant.store.run_directory import (
    CALIBRATION,
    CODES,
    GRADIENT_LOG,
    INTERACTIONS,
    NOISE,
    SENSITIVITY,
    SENSITIVITY_LOG,
    SPLITS,
    STATISTICS,
    RunDirectory,
    differences,
    environments_of,
    home_of,
    read_identity,
    read_json,
)
from autoquant.study.journal import read_trials

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from autoquant.study.joining.roster import Roster

PROBES = (CALIBRATION, GRADIENT_LOG, NOISE, SENSITIVITY_LOG, SENSITIVITY)
PROBED_SPLITS = ("calibration", "search")
"""Splits that probes depend on."""


@dataclass
class Shared:
    """The live model and the runs before this one; empty for a search of its own."""

    session: Session | None = None
    ranks: Ranks = ALONE
    """The processes that measure together."""
    probes: Path | None = None
    """A run directory with finished probes of the same settings."""
    runs: list[Path] = field(default_factory=list)
    """Finished run directories with the same model, space, tokens and seed."""
    confirmed: dict[str, TokenScores] = field(default_factory=dict)
    """Scores on the report split by assignment digest."""
    storage: "BaseStorage | None" = None
    """Where their studies are repeated."""
    roster: "Roster | None" = None
    """Of workers that join from other machines."""

    def adopt_probes(self, run: RunDirectory) -> None:
        """Copy an earlier run's probes into a run that has none, and let it have the statistics and
        codes that they rest on; the runs after the first one find them there.
        """
        donor = self.probes if self.probes is not None else next(iter(self.runs), None)
        if donor is None or run.read_json(SENSITIVITY) is not None:
            return
        if (donor / INTERACTIONS).is_dir():
            shutil.copytree(donor / INTERACTIONS, run.path / INTERACTIONS, dirs_exist_ok=True)
        splits = read_json(donor, SPLITS) or {}
        run.write_json(SPLITS, {name: splits[name] for name in PROBED_SPLITS})
        for environment in environments_of(read_identity(donor) or {}):
            run.add_environment(environment)
        for name in PROBES:
            if (donor / name).exists():
                run.adopt(donor, name)
        if not self.runs:
            for name in (STATISTICS, CODES):
                if (folder := home_of(donor) / name).is_dir():
                    link_files(folder, run.path / name)

    def home(self, run: Path) -> Path:
        """The run directory with the statistics and codes of a run: the first one that shares them,
        also where an earlier process finished that one.
        """
        return next(iter(self.runs), run)

    def trials(self) -> Iterator[Trial]:
        """What earlier runs measured to the end on the same search tokens."""
        for path in self.runs:
            yield from (trial for trial in read_trials(path) if not trial.is_stopped)


def finished_probes(path: Path, wanted: Mapping[str, Any]) -> Path:
    """The run directory `path`, if its probes have the signature `wanted`.

    Raises:
        ConfigError: it is no run directory, or its probes are not finished.
        RunConflict: they rest on other settings.
    """
    identity = read_identity(path) if path.is_dir() else None
    if identity is None:
        raise ConfigError(
            f"{path} is no run directory.",
            fix="name a folder that `autoquant probe` or `autoquant search` has printed.",
        )
    if read_json(path, SENSITIVITY) is None:
        raise ConfigError(
            f"the probes of {path} are not finished.", fix="go on with the command that began them."
        )
    differing = differences(probe_part(identity["signature"]), wanted)
    if differing:
        raise RunConflict(
            f"the probes of {path} rest on other settings: {'; '.join(differing)}.",
            fix="repeat the options that they were made with, or leave --sensitivity out.",
        )
    return path
