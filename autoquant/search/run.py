"""A search with everything around it: run directory, tracking, driver."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoquant.errors import ConfigError
from autoquant.plan import make_plan
from autoquant.rundir import CONFIG, RunDirectory
from autoquant.search.config import SearchConfig
from autoquant.search.driver import Search
from autoquant.search.observer import Observer
from autoquant.tracking import ChildRuns, NullTracker, track

RUNS = Path("runs")
"""Where runs go that are not told a folder."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished search."""

    path: Path
    result: dict[str, Any]
    """The contents of `result.json`."""


def run_search(
    config: SearchConfig,
    *,
    out: Path | None,
    resume: bool,
    settings: Mapping[str, Any],
    command: str,
    track_in_mlflow: bool,
    experiment: str,
    child_runs: ChildRuns,
    observer: Observer,
) -> Outcome:
    """Run a search, or go on with it.

    Args:
        config: what to search.
        out: run directory; a folder of `runs/` named after the search by default.
        resume: False sets an earlier run in the directory aside.
        settings: resolved settings, written to the run directory and to MLflow.
        command: the command line, for the model card.
        track_in_mlflow: whether to record the search.
        experiment: MLflow experiment.
        child_runs: trials that get an MLflow run of their own.
        observer: watches.

    Raises:
        ConfigError: the space leaves nothing to choose.
        InfeasibleBudget: nothing was written and no weight was read.
        RunConflict: the directory holds another search, or another process holds it.
        SourceError: model or text missing, damaged or not understood.
    """
    import yaml

    plan = make_plan(config.source, config.space)
    plan.require_feasible(config.budget)
    if not plan.options.open:
        raise ConfigError(
            f"the search space {config.space.name} leaves no layer of {config.source.model} open.",
            fix="`autoquant plan` says why; open some layers, or export an assignment.",
        )
    path = out if out is not None else RUNS / config.run_name()
    with RunDirectory.open(path, config.signature(), resume=resume) as run:
        observer.note(f"run directory: {path}")
        run.write_text(CONFIG, yaml.safe_dump(dict(settings), sort_keys=False))
        if not track_in_mlflow:
            search = Search(config, run, NullTracker(), observer, command)
            return Outcome(path=path, result=search.execute())
        with track(
            run,
            settings,
            model=config.source.model,
            source_digest=config.source.digest,
            experiment=experiment,
            child_runs=child_runs,
            warn=observer.warn,
        ) as tracker:
            search = Search(config, run, tracker, observer, command)
            return Outcome(path=path, result=search.execute())
