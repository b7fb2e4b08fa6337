"""A search with everything around it: run directory, tracking, driver."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from autoquant.errors import ConfigError, RunConflict
from autoquant.plan.plan import Plan, make_plan
from autoquant.run.config import SearchConfig
from autoquant.run.observer import Observer
from autoquant.run.shared import Shared, finished_probes
from autoquant.run.stages import Search
from autoquant.search.problem import require_feasible
from autoquant.search.trials import Stage
from autoquant.store.run_directory import (
    CONFIG,
    RESULT,
    SENSITIVITY,
    RunDirectory,
    read_identity,
    read_json,
)
from autoquant.tracking import ChildRuns, NullTracker, Tracker, track

RUNS = Path("runs")
"""Where runs go that are not told a folder."""

COMPARISON = "compare.html"
"""Written beside the runs of several budgets."""

_NOT_OF_TRIALS = frozenset({Stage.BASELINE, Stage.SOLVER, Stage.RULES})
"""Stages that `trials` does not count."""

_AFTER_TRIALS = frozenset({"confirm", "export", "total"})
"""Seconds of a result that no limit of the trials counts."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished search, or finished probes."""

    path: Path
    result: dict[str, Any]
    """The contents of `result.json`, or of `sensitivity.json`."""


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
    sensitivity: Path | None = None,
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
        sensitivity: run directory whose probes are taken over; by default the one that
            `run_probes` chose for the same settings, if it is there.

    Raises:
        ConfigError: the space leaves nothing to choose, or `sensitivity` holds no probes.
        InfeasibleBudget: one of them; nothing was written and no weight was read.
        RunConflict: a directory holds another search, or another process holds it, or the probes
            of `sensitivity` rest on other settings.
        SourceError: model or text missing, damaged or not understood.
    """
    for config in configs:
        plan = _require_a_choice(config)
        require_feasible(plan.accounting, config.limits(plan))
    for config in configs:
        config.source.contents.digests(observer)
    paths = _paths(configs, out)
    for path in paths:
        _refuse_probes_alone(path)
    probes = _probes_of(configs[0], sensitivity) if resume or sensitivity else None
    if probes is not None:
        observer.note(f"probes: {probes}")
    shared, outcomes = Shared(probes=probes), []
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
            runs=path.parent if len(paths) == 1 else path.parent.parent,
        )
        shared.runs.append(path)
        outcomes.append(outcome)
    if len(outcomes) > 1:
        _write_comparison(paths, observer)
    return outcomes


def run_probes(
    config: SearchConfig,
    *,
    out: Path | None,
    resume: bool,
    settings: Mapping[str, Any],
    command: str,
    observer: Observer,
) -> Outcome:
    """Calibrate and probe, or go on with it; the result is what `sensitivity.json` holds.

    Args:
        config: the budget and what comes after the probes do not matter.
        out: run directory; by default a folder of `runs/` where a search with the same settings
            finds it.
        resume: False sets an earlier run aside.
        settings: resolved settings, written to the run directory.
        command: the command line.
        observer: watches.

    Raises:
        ConfigError: the space leaves nothing to choose.
        RunConflict: the directory holds something else, or another process holds it.
        SourceError: model or text missing, damaged or not understood.
    """
    _require_a_choice(config)
    config.source.contents.digests(observer)
    path = out if out is not None else RUNS / config.probe_name()
    with RunDirectory.open(path, config.probe_signature(), resume=resume) as run:
        observer.note(f"run directory: {path}")
        if run.read_json(SENSITIVITY) is None:
            _write_settings(run, settings)
        search = Search(config, run, NullTracker(), observer, command)
        return Outcome(path=path, result=search.probe())


def _refuse_probes_alone(path: Path) -> None:
    identity = read_identity(path)
    if identity is not None and "budget_bpe" not in identity["signature"]:
        raise RunConflict(
            f"run directory {path} holds probes alone, which searches of any budget may share.",
            fix=f"give --sensitivity {shlex.quote(str(path))} and another --out.",
        )


def _probes_of(config: SearchConfig, given: Path | None) -> Path | None:
    if given is not None:
        return finished_probes(given, config)
    path = RUNS / config.probe_name()
    if not path.is_dir() or read_json(path, SENSITIVITY) is None:
        return None
    return finished_probes(path, config)


def _require_a_choice(config: SearchConfig) -> Plan:
    plan = make_plan(config.source, config.space, config.kv_cache)
    if not plan.options.open:
        raise ConfigError(
            f"the search space {config.space.name} leaves no layer of {config.source.model} open.",
            fix="`autoquant plan` says why; open some layers, or export an assignment.",
        )
    return plan


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
    runs: Path,
) -> Outcome:
    with RunDirectory.open(path, config.signature(), resume=resume) as run:
        observer.note(f"run directory: {path}")
        is_finished = run.read_json(RESULT) is not None
        if is_finished:
            settings = _stored_settings(run) or settings
        else:
            _write_settings(run, settings)
        with _recording(config, run, settings, tracking, observer, runs) as tracker:
            result = Search(config, run, tracker, observer, command, shared).execute()
    limit = _limit_reached(config, settings, result)
    if limit is not None:
        observer.note(f"{path}: {limit}")
    if is_finished or limit is not None:
        observer.note(f"{path}: this result stays; --fresh sets it aside and begins anew.")
    return Outcome(path=path, result=result)


def _recording(
    config: SearchConfig,
    run: RunDirectory,
    settings: Mapping[str, Any],
    tracking: Tracking,
    observer: Observer,
    runs: Path,
) -> AbstractContextManager[Tracker]:
    """MLflow's run of the search while it lasts, or nothing."""
    if not tracking.is_on:
        return nullcontext(NullTracker())
    return track(
        run,
        settings,
        model=config.source.model,
        source_digest=config.source.digest,
        experiment=tracking.experiment,
        child_runs=tracking.child_runs,
        warn=observer.warn,
        runs=runs,
    )


def _write_settings(run: RunDirectory, settings: Mapping[str, Any]) -> None:
    import yaml

    run.write_text(CONFIG, yaml.safe_dump(dict(settings), sort_keys=False))


def _stored_settings(run: RunDirectory) -> dict[str, Any] | None:
    """The settings that were in force when the search ended; None where they cannot be read."""
    import yaml

    try:
        settings = yaml.safe_load((run.path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return settings if isinstance(settings, dict) else None


def _limit_reached(
    config: SearchConfig, settings: Mapping[str, Any], result: Mapping[str, Any]
) -> str | None:
    """Which limit ended the trials before their number did, in words, or None."""
    stages = result["stages"]
    trials = sum(row["trials"] for row in stages if row["stage"] not in _NOT_OF_TRIALS)
    if trials >= config.trials:
        return None
    most_seconds, most_tokens = settings.get("max_seconds"), config.max_tokens
    seconds = sum(s for name, s in result["seconds"].items() if name not in _AFTER_TRIALS)
    if most_tokens is not None and sum(row["tokens"] for row in stages) >= most_tokens:
        limit = f"--max-tokens {most_tokens}"
    elif isinstance(most_seconds, (int, float)) and seconds >= most_seconds:
        limit = f"--max-seconds {most_seconds:g}"
    else:
        return None
    return f"{limit} ended the trials early, {trials} of {config.trials} were measured."


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
