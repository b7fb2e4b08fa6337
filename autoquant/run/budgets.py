"""A search with everything around it: run directory, tracking, driver."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoquant.decimals import shortest
from autoquant.errors import ConfigError, RunConflict
from autoquant.measure.ranks.group import process_group
from autoquant.measure.ranks.ranks import Ranks
from autoquant.measure.ranks.together import lead
from autoquant.parsing import Unreadable, parse_yaml, read_text
from autoquant.plan.plan import Plan
from autoquant.run.config import ProbeConfig, SearchConfig
from autoquant.run.config.file import settings_text
from autoquant.run.machines.following import follow_run, open_plan_on_all
from autoquant.run.machines.joining import roster_of
from autoquant.run.observer import Observer, or_warn
from autoquant.run.opening import limits_of
from autoquant.run.sensitivity.probing import Probing
from autoquant.run.shared import Shared, finished_probes
from autoquant.run.signature import (
    budget_name,
    probe_name,
    probe_signature,
    search_name,
    search_signature,
)
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
from autoquant.study.frontier import FRONTIER, write_frontier
from autoquant.study.mirror import open_storage
from autoquant.study.sampling import require_sampler
from autoquant.tracking import NullTracker, Tracker, track

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


def run_searches(config: SearchConfig, observer: Observer) -> list[Outcome]:
    """Run a search for each budget, or go on with them.

    Several budgets share calibration, probes and what is measured of the same assignment; each
    has a run directory of its own in `out`, the same as a search of that budget alone would write.

    Args:
        config: `out` is the run directory, or with several budgets the folder of the run
            directories; without `sensitivity`, finished probes of the same settings are taken over
            from where `run_probes` leaves them.
        observer: watches.

    Returns:
        One for each budget, on every rank.

    Raises:
        ConfigError: the space leaves nothing to choose, `sensitivity` holds no probes, there is
            no such sampler, or several ranks were to have workers too.
        InfeasibleBudget: one of them; nothing was written and no weight was read.
        RunConflict: a directory holds another search, or another process holds it, or the probes
            of `sensitivity` rest on other settings, or the study's storage does not answer or has
            another search's study.
        SourceError: model or text missing, damaged or not understood.
    """
    with process_group() as ranks:
        if ranks.is_leader:
            return lead(ranks, lambda: _run_searches(config, observer, ranks))
        found: list[Outcome] = follow_run(config, ranks)
        return found


def _run_searches(config: SearchConfig, observer: Observer, ranks: Ranks) -> list[Outcome]:
    if ranks.size > 1 and config.workers > 1:
        raise _two_ways(config, ranks)
    require_sampler(config.sampler)
    storage = open_storage(config.study_storage) if config.study_storage is not None else None
    plan = _open_plan(config, ranks)
    searches = config.of_each_budget()
    for search in searches:
        require_feasible(plan.accounting, limits_of(search, plan))
    plan.source.contents.digests(observer)
    paths = _paths(searches, plan, config.out)
    for path in paths:
        _refuse_probes_alone(path)
    probes = _probes_of(config, plan) if config.resume or config.sensitivity else None
    if probes is not None:
        observer.note(f"probes: {probes}")
    name = _name(searches, plan)
    with roster_of(config, plan, storage, name, ranks) as roster:
        shared = Shared(probes=probes, storage=storage, ranks=ranks, roster=roster)
        batch = _Batch(config=config, plan=plan, observer=observer, shared=shared)
        outcomes = [batch.run(search, path) for search, path in zip(searches, paths, strict=True)]
    if len(outcomes) > 1:
        page, frontier = (paths[0].parent / name for name in (COMPARISON, FRONTIER))
        with or_warn(page, observer):
            _write_comparison(paths)
            observer.note(f"all budgets side by side: {page}")
        with or_warn(frontier, observer):
            write_frontier(paths, plan.accounting)
            observer.note(f"the frontier as a study: {frontier}")
    return outcomes


def _two_ways(config: SearchConfig, ranks: Ranks) -> ConfigError:
    return ConfigError(
        f"{ranks.size} processes share the batches of this search, and --workers {config.workers} "
        "would share its trials.",
        fix="leave --workers out, or start one process.",
    )


def run_probes(config: ProbeConfig, observer: Observer) -> Outcome:
    """Calibrate and probe, or go on with it; the result is what `sensitivity.json` holds.

    Args:
        config: without `out`, the run directory is where a search with the same settings finds it.
        observer: watches.

    Raises:
        ConfigError: the space leaves nothing to choose.
        RunConflict: the directory holds something else, or another process holds it.
        SourceError: model or text missing, damaged or not understood.
    """
    with process_group() as ranks:
        if ranks.is_leader:
            return lead(ranks, lambda: _run_probes(config, observer, ranks))
        found: Outcome = follow_run(config, ranks)
        return found


def _run_probes(config: ProbeConfig, observer: Observer, ranks: Ranks) -> Outcome:
    plan = _open_plan(config, ranks)
    plan.source.contents.digests(observer)
    path = config.out if config.out is not None else RUNS / probe_name(config, plan)
    with RunDirectory.open(path, probe_signature(config, plan), resume=config.resume) as run:
        observer.note(f"run directory: {path}")
        if run.read_json(SENSITIVITY) is None:
            run.write_text(CONFIG, settings_text(config))
        probing = Probing(
            config=config, plan=plan, run=run, observer=observer, shared=Shared(ranks=ranks)
        )
        return Outcome(path=path, result=probing.probe())


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Searches of one model under one budget or several, in their order."""

    config: SearchConfig
    """Of all of them."""
    plan: Plan
    observer: Observer
    shared: Shared

    def run(self, search: SearchConfig, path: Path) -> Outcome:
        """One of the searches, in its run directory."""
        signature = search_signature(search, self.plan)
        with RunDirectory.open(path, signature, resume=search.resume) as run:
            self.observer.note(f"run directory: {path}")
            is_finished = run.read_json(RESULT) is not None
            settings = (_stored_settings(run) if is_finished else None) or search.saved()
            if not is_finished:
                run.write_text(CONFIG, settings_text(search))
            with self._recording(run, settings) as tracker:
                result = Search(
                    config=search,
                    plan=self.plan,
                    limits=limits_of(search, self.plan),
                    run=run,
                    tracker=tracker,
                    observer=self.observer,
                    shared=self.shared,
                    command=self._command(),
                ).execute()
        self.shared.runs.append(path)
        limit = _limit_reached(search, settings, result)
        if limit is not None:
            self.observer.note(f"{path}: {limit}")
        if is_finished or limit is not None:
            self.observer.note(f"{path}: this result stays; --fresh sets it aside and begins anew.")
        return Outcome(path=path, result=result)

    def _command(self) -> str:
        """The command that goes on with these searches, or shows their results again."""
        return self.config.model_copy(update={"resume": True}).command_line()

    def _recording(
        self, run: RunDirectory, settings: Mapping[str, Any]
    ) -> AbstractContextManager[Tracker]:
        """MLflow's run of the search while it lasts, or nothing."""
        if not self.config.mlflow:
            return nullcontext(NullTracker())
        is_alone = len(self.config.budget_bpe) == 1
        return track(
            run,
            settings,
            model=self.plan.source.model,
            source_digest=self.plan.source.digest,
            experiment=self.config.mlflow_experiment,
            child_runs=self.config.mlflow_trials,
            warn=self.observer.warn,
            runs=run.path.parent if is_alone else run.path.parent.parent,
        )


def _refuse_probes_alone(path: Path) -> None:
    identity = read_identity(path)
    if identity is not None and "budget_bpe" not in identity["signature"]:
        raise RunConflict(
            f"run directory {path} holds probes alone, which searches of any budget may share.",
            fix=f"give --sensitivity {shlex.quote(str(path))} and another --out.",
        )


def _probes_of(config: SearchConfig, plan: Plan) -> Path | None:
    wanted = probe_signature(config, plan)
    if config.modelopt_state is not None:
        return None
    if config.sensitivity is not None:
        return finished_probes(config.sensitivity, wanted)
    path = RUNS / probe_name(config, plan)
    if not path.is_dir() or read_json(path, SENSITIVITY) is None:
        return None
    return finished_probes(path, wanted)


def _open_plan(config: ProbeConfig, ranks: Ranks) -> Plan:
    plan = open_plan_on_all(config, ranks)
    if not plan.options.open:
        raise ConfigError(
            f"the search space {plan.space.name} leaves no layer of {plan.source.model} open.",
            fix="`autoquant plan` says why; open some layers, or export an assignment.",
        )
    return plan


def _name(searches: Sequence[SearchConfig], plan: Plan) -> str:
    """Of all searches of a command."""
    name = search_name(searches[0], plan)
    return name if len(searches) == 1 else f"{name}-{len(searches)}-budgets"


def _paths(searches: Sequence[SearchConfig], plan: Plan, out: Path | None) -> list[Path]:
    folder = out if out is not None else RUNS / _name(searches, plan)
    if len(searches) == 1:
        return [folder]
    if read_identity(folder) is not None:
        raise RunConflict(
            f"{folder} is the run directory of a single budget.",
            fix="give several budgets another folder with --out.",
        )
    return [folder / budget_name(search) for search in searches]


def _stored_settings(run: RunDirectory) -> dict[str, Any] | None:
    """The settings that were in force when the search ended; None where they cannot be read."""
    try:
        settings = parse_yaml(read_text(run.path / CONFIG))
    except (OSError, Unreadable):
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
        limit = f"--max-seconds {shortest(most_seconds)}"
    else:
        return None
    return f"{limit} ended the trials early, {trials} of {config.trials} were measured."


def _write_comparison(paths: Sequence[Path]) -> None:
    """Set the runs side by side in the folder that holds them."""
    from autoquant.files import write_atomic
    from autoquant.report.compare import render_comparison
    from autoquant.report.record import RunRecord

    page = render_comparison([RunRecord.read(path) for path in paths])
    write_atomic(paths[0].parent / COMPARISON, page)
