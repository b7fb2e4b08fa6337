"""Tasks on the assignments of a model, of a run, or on a checkpoint."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import autoquant
from autoquant.environment import package_versions
from autoquant.errors import ConfigError
from autoquant.evaluate.evaluated import BASELINE, Candidate, Evaluation
from autoquant.evaluate.evaluating import Terms, evaluate
from autoquant.evaluate.tasks import open_tasks
from autoquant.export.companions import AUTOQUANT_FILE
from autoquant.files import to_json, write_atomic
from autoquant.forward.flow import BF16_MODEL
from autoquant.measure.session import Session
from autoquant.model.memory import return_freed_memory
from autoquant.plan.assignment import Assignment
from autoquant.report.html import write_report, writing
from autoquant.report.record import RunRecord
from autoquant.run.config import EvaluateConfig
from autoquant.run.evaluation.of_run import open_run
from autoquant.run.observer import Observer, or_warn
from autoquant.run.opening import open_model
from autoquant.run.subjects.assignments import Opened, open_assignments, open_checkpoint
from autoquant.run.subjects.source import source_of
from autoquant.store.run_directory import EVALUATION, IDENTITY, REPORT, read_json, write_json
from autoquant.tracking.evaluation import record_evaluation

PACKAGES = ("torch", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What tasks are run on."""

    session: Session
    model: str
    target: str
    candidates: tuple[tuple[Candidate, Assignment], ...]
    run: RunRecord | None = None


def evaluate_tasks(config: EvaluateConfig, observer: Observer) -> Evaluation:
    """Run tasks, and keep what they say: in the run directory, its report and its MLflow run, or
    in `out`.

    Raises:
        ConfigError: no such task, assignment or file, or lm-eval is not installed.
        SourceError: model, text, checkpoint or a task's data missing, damaged or not matching.
        RunConflict: the run's model or text have changed.
    """
    tasks = open_tasks(config.tasks, shots=config.shots)
    subject = _open(config, observer)
    terms = Terms(
        limit=config.limit,
        is_chat=config.chat_template,
        seed=config.seed,
        batch_tokens=config.batch_tokens,
    )
    started, scores = time.monotonic(), []
    for candidate, assignment in subject.candidates:
        scores += evaluate(
            subject.session,
            assignment,
            tasks,
            terms,
            name=candidate.name,
            with_cache=candidate.name != BASELINE,
            observer=observer,
        )
        return_freed_memory()
    found = Evaluation(
        model=subject.model,
        target=subject.target,
        candidates=tuple(candidate for candidate, _ in subject.candidates),
        scores=tuple(scores),
    )
    facts = _facts(config, subject.session, time.monotonic() - started)
    if config.out is not None:
        with writing(config.out):
            write_atomic(config.out, to_json(found.to_dict() | facts, indent=2) + "\n")
    if subject.run is None:
        return found
    return _keep(subject.run.path, found, facts, observer)


def _facts(config: EvaluateConfig, session: Session, seconds: float) -> dict[str, Any]:
    """What else is written down of an evaluation."""
    return {
        "tasks": list(config.tasks),
        "limit": config.limit,
        "chat_template": config.chat_template,
        "device": str(session.loaded.device),
        "seconds": seconds,
        "versions": {"autoquant": autoquant.__version__, "lm-eval": _harness_version()}
        | package_versions(PACKAGES),
    }


def _harness_version() -> str:
    from importlib.metadata import version

    return version("lm-eval")


def _keep(run: Path, found: Evaluation, facts: dict[str, Any], observer: Observer) -> Evaluation:
    """Add an evaluation to those of a run, in its report and in MLflow too."""
    stored = read_json(run, EVALUATION)
    whole = found if stored is None else Evaluation.of(stored, str(run / EVALUATION)).with_(found)
    with writing(run / EVALUATION):
        write_json(run, EVALUATION, whole.to_dict() | facts)
    with or_warn(REPORT, observer):
        write_report(RunRecord.read(run))
    record_evaluation(run, found, observer.warn)
    return whole


def _open(config: EvaluateConfig, observer: Observer) -> Subject:
    """The model of what the command names, and the assignments that are asked for."""
    folder = Path(config.model) if config.model is not None else None
    if folder is not None and (folder / IDENTITY).is_file():
        return _of_run(config, folder, observer)
    if folder is not None and (folder / AUTOQUANT_FILE).is_file():
        return _of_checkpoint(config, folder, observer)
    if config.source is not None:
        raise ConfigError(
            f"--source {config.source} without a checkpoint: {config.model} is none.",
            fix="leave --source out.",
        )
    names = [name for name in config.assignment or () if name != BASELINE]
    given = [Assignment.read(_file(name)) for name in names]
    opened = open_assignments(config, open_model(config), given, observer)
    titles = [Path(name).stem for name in names]
    wants_baseline = config.assignment is None or BASELINE in config.assignment
    return _measured(config, opened, titles, observer, wants_baseline=wants_baseline)


def _file(name: str) -> Path:
    if not Path(name).is_file():
        raise ConfigError(
            f"the assignment {name} does not exist.",
            fix=f"name a file, or {BASELINE}; names of recipes need a run directory.",
        )
    return Path(name)


def _of_checkpoint(config: EvaluateConfig, folder: Path, observer: Observer) -> Subject:
    wanted = config.assignment or (BASELINE, "checkpoint")
    if not {*wanted} <= {BASELINE, "checkpoint"}:
        raise ConfigError(
            f"a checkpoint holds one assignment, and {', '.join(wanted)} is asked for.",
            fix=f"leave --assignment out, or write {BASELINE} or checkpoint.",
        )
    source = source_of(folder, config.source, config.revision)
    opened = open_checkpoint(config, source, folder, observer)
    names = ["checkpoint"] if "checkpoint" in wanted else []
    return _measured(config, opened, names, observer, wants_baseline=BASELINE in wanted)


def _measured(
    config: EvaluateConfig,
    opened: Opened,
    names: Sequence[str],
    observer: Observer,
    *,
    wants_baseline: bool,
) -> Subject:
    """Assignments with their KL on the report tokens, as `autoquant score` measures it."""
    session, candidates = opened.session, []
    if wants_baseline:
        candidates.append((Candidate.bf16(opened.bpe(BF16_MODEL)), BF16_MODEL))
    assignments = opened.assignments[: len(names)]
    if assignments:
        observer.stage("score", len(assignments))
    for name, assignment in zip(names, assignments, strict=True):
        (scores,) = session.scorer.score_fully([assignment], session.splits["report"])
        observer.step()
        candidate = Candidate(
            name=name,
            digest=assignment.digest,
            bpe=opened.bpe(assignment),
            kl=scores.mean,
            stderr=scores.stderr(),
        )
        candidates.append((candidate, assignment))
    session.scorer.forget(session.splits["report"])
    return Subject(
        session=session,
        model=opened.source.model,
        target=str(config.served_by),
        candidates=tuple(candidates),
    )


def _of_run(config: EvaluateConfig, folder: Path, observer: Observer) -> Subject:
    run = RunRecord.read(folder)
    opened = open_run(run, config, observer)
    return Subject(
        session=opened.session,
        model=opened.plan.source.model,
        target=str(opened.config.served_by),
        candidates=opened.candidates,
        run=run,
    )
