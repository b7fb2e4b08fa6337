"""A finished run opened for tasks: its winner and its trials, with the codes that were scored."""

from dataclasses import dataclass
from pathlib import Path

from autoquant.errors import ConfigError
from autoquant.evaluate.evaluated import BASELINE, WINNER, Candidate
from autoquant.formats import BF16, Choice
from autoquant.forward.flow import BF16_MODEL
from autoquant.plan.assignment import Assignment, require_legal
from autoquant.plan.plan import Plan
from autoquant.report.record import RunRecord
from autoquant.run.config import EvaluateConfig
from autoquant.run.measuring import code_cache, statistics_store
from autoquant.run.observer import Observer
from autoquant.run.opening import open_plan
from autoquant.run.polishing import is_polished, make_polish, require_codes
from autoquant.run.subjects.assignments import collect_for
from autoquant.run.subjects.finished import Reopened, config_of, placing, reopen, require_finished
from autoquant.search.trials import Stage
from autoquant.store.run_directory import ASSIGNMENT


@dataclass(frozen=True, kw_only=True)
class OpenedRun(Reopened):
    """A run whose model is loaded, and what of it is evaluated."""

    candidates: tuple[tuple[Candidate, Assignment], ...]


def open_run(run: RunRecord, config: EvaluateConfig, observer: Observer) -> OpenedRun:
    """Load a finished run's model with the settings, calibration and codes of the run.

    Args:
        run: finished.
        config: says which assignments; of the rest, the device and where weights are.
        observer: told of progress.

    Raises:
        ConfigError: the run is not finished, or has no such assignment, or not its refitted codes
            or the input ranges that it needs.
        SourceError: model or text missing or damaged.
        RunConflict: model or text are no longer those of the run.
    """
    result = require_finished(run)
    names = config.assignment or (BASELINE, WINNER)
    chosen = {name: _assignment(run, name) for name in names}
    for assignment in chosen.values():
        require_codes(assignment, run.path)
    settings = config_of(run, **placing(config))
    plan = open_plan(settings)
    for assignment in chosen.values():
        require_legal(assignment, plan.groups)
        _require_calibrated(assignment, plan)
    reopened = reopen(
        run,
        settings,
        observer,
        codes=code_cache(plan.source, run.path),
        statistics=statistics_store(run.path),
    )
    session = reopened.session
    collect_for(session, list(chosen.values()), observer)
    for assignment in chosen.values():
        if is_polished(assignment):
            make_polish(session, assignment, result["polish"]["key"], observer)
    return OpenedRun(
        config=reopened.config,
        plan=reopened.plan,
        session=session,
        candidates=tuple((_candidate(run, reopened, n, own), own) for n, own in chosen.items()),
    )


def _require_calibrated(assignment: Assignment, plan: Plan) -> None:
    """Return if the run has input ranges of every group that an assignment quantizes.

    Raises:
        ConfigError: its space leaves one in BF16.
    """
    for name, choice in assignment:
        if choice != BF16 and plan.options.choices[name] == (BF16,):
            raise ConfigError(
                f"the assignment puts {name} into {choice}, and the space {plan.space.name} of the "
                "run leaves it in BF16, so that the run has no range of its inputs.",
                fix="name the model instead of the run: then it is calibrated for the assignment.",
            )


def _assignment(run: RunRecord, name: str) -> Assignment:
    if name == BASELINE:
        return BF16_MODEL
    if name == WINNER:
        return Assignment.read(run.path / ASSIGNMENT)
    if Path(name).is_file():
        return Assignment.read(Path(name))
    trial = next((t for t in run.trials if name in (t.name, str(t.number))), None)
    if trial is not None:
        return Assignment.of({group: Choice.parse(own) for group, own in trial.groups.items()})
    recipes = (f"{t.number} ({t.name})" for t in run.trials if t.stage == Stage.BASELINE)
    raise ConfigError(
        f"{run.path} has no trial {name!r}, and there is no such file.",
        fix=f"write {BASELINE}, {WINNER}, or a trial's number or name: {', '.join(recipes)}.",
    )


def _candidate(run: RunRecord, reopened: Reopened, name: str, assignment: Assignment) -> Candidate:
    """With the KL on the report tokens: as the run confirmed it on them, or measured now."""
    bpe = reopened.plan.accounting.bpe(assignment)
    if name == BASELINE:
        return Candidate.bf16(bpe)
    result = require_finished(run)
    rows = [*result["baselines"], *result["finalists"]]
    confirmed = next((r for r in rows if name in (r["name"], str(r["trial"]))), None)
    if name == WINNER:
        kl, stderr = result["kl"]["mean"], result["kl"]["stderr"]
    elif confirmed is not None:
        kl, stderr = confirmed["kl"], confirmed["stderr"]
    else:
        found = reopened.session.scorer.score(assignment, reopened.session.splits["report"])
        kl, stderr = found.mean, found.stderr()
    title = Path(name).stem if Path(name).is_file() else name
    return Candidate(name=title, digest=assignment.digest, bpe=bpe, kl=kl, stderr=stderr)
