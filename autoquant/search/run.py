"""A search with everything around it: run directory, tracking, driver."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from autoquant.errors import ConfigError, RunConflict
from autoquant.plan import make_plan
from autoquant.rundir import CONFIG, RunDirectory, read_identity
from autoquant.search.config import SearchConfig
from autoquant.search.driver import Search
from autoquant.search.observer import Observer
from autoquant.search.shared import Shared
from autoquant.tracking import ChildRuns, NullTracker, track

RUNS = Path("runs")
"""Where runs go that are not told a folder."""

COMPARISON = "compare.html"
"""Written beside the runs of several budgets."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished search."""

    path: Path
    result: dict[str, Any]
    """The contents of `result.json`."""


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """How searches are recorded in MLflow."""

    is_on: bool
    experiment: str
    child_runs: ChildRuns
    """Trials that get a run of their own."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """As the settings of a search name it."""
        return cls(
            is_on=settings["mlflow"],
            experiment=settings["mlflow_experiment"],
            child_runs=settings["mlflow_trials"],
        )


def run_searches(
    configs: Sequence[SearchConfig],
    *,
    out: Path | None,
    resume: bool,
    settings: Mapping[str, Any],
    command: str,
    tracking: Tracking,
    observer: Observer,
) -> list[Outcome]:
    """Run a search for each budget, or go on with them.

    Several budgets share calibration, probes and what is measured of the same assignment; each
    has a run directory of its own in `out`, the same as a search of that budget alone would write.

    Args:
        configs: the same search under each budget.
        out: run directory, or with several budgets the folder of the run directories; a folder of
            `runs/` named after the search by default.
        resume: False sets earlier runs aside.
        settings: resolved settings, written to the run directories and to MLflow.
        command: the command line, for the model card.
        tracking: whether and how to record.
        observer: watches.

    Raises:
        ConfigError: the space leaves nothing to choose.
        InfeasibleBudget: one of them; nothing was written and no weight was read.
        RunConflict: a directory holds another search, or another process holds it.
        SourceError: model or text missing, damaged or not understood.
    """
    for config in configs:
        _require_a_choice(config)
    paths = _paths(configs, out)
    shared, outcomes = Shared(), []
    for config, path in zip(configs, paths, strict=True):
        outcome = _run(
            config,
            path,
            resume=resume,
            settings={**settings, "budget_bpe": config.budget.bpe},
            command=command,
            tracking=tracking,
            observer=observer,
            shared=shared,
        )
        shared.runs.append(path)
        outcomes.append(outcome)
    if len(outcomes) > 1:
        _write_comparison(paths, observer)
    return outcomes


def _require_a_choice(config: SearchConfig) -> None:
    plan = make_plan(config.source, config.space, config.kv_cache)
    plan.require_feasible(config.budget, config.cost)
    if not plan.options.open:
        raise ConfigError(
            f"the search space {config.space.name} leaves no layer of {config.source.model} open.",
            fix="`autoquant plan` says why; open some layers, or export an assignment.",
        )


def _paths(configs: Sequence[SearchConfig], out: Path | None) -> list[Path]:
    if len(configs) == 1:
        return [out if out is not None else RUNS / configs[0].run_name()]
    folder = out if out is not None else RUNS / f"{configs[0].run_name()}-{len(configs)}-budgets"
    if read_identity(folder) is not None:
        raise RunConflict(
            f"{folder} is the run directory of a single budget.",
            fix="give several budgets another folder with --out.",
        )
    return [folder / f"{config.budget.bpe:g}bpe" for config in configs]


def _run(
    config: SearchConfig,
    path: Path,
    *,
    resume: bool,
    settings: Mapping[str, Any],
    command: str,
    tracking: Tracking,
    observer: Observer,
    shared: Shared,
) -> Outcome:
    import yaml

    with RunDirectory.open(path, config.signature(), resume=resume) as run:
        observer.note(f"run directory: {path}")
        run.write_text(CONFIG, yaml.safe_dump(dict(settings), sort_keys=False))
        if not tracking.is_on:
            search = Search(config, run, NullTracker(), observer, command, shared)
            return Outcome(path=path, result=search.execute())
        with track(
            run,
            settings,
            model=config.source.model,
            source_digest=config.source.digest,
            experiment=tracking.experiment,
            child_runs=tracking.child_runs,
            warn=observer.warn,
        ) as tracker:
            search = Search(config, run, tracker, observer, command, shared)
            return Outcome(path=path, result=search.execute())


def _write_comparison(paths: Sequence[Path], observer: Observer) -> None:
    """Set the runs side by side in the folder that holds them."""
    from autoquant.files import write_atomic
    from autoquant.report.compare import render_comparison
    from autoquant.report.record import RunRecord

    target = paths[0].parent / COMPARISON
    try:
        write_atomic(target, render_comparison([RunRecord.read(path) for path in paths]))
    except Exception as error:
        observer.warn(f"{target} could not be written: {type(error).__name__}: {error}")
    else:
        observer.note(f"all budgets side by side: {target}")
