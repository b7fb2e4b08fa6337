"""The search from headers to a confirmed assignment and its checkpoint.

Only this module and what it calls for the purpose touch the run directory and the tracker; the
stages below are pure given the scorer.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autoquant.codes.book import CodeBook
from autoquant.data.tokens import FEWEST_UNITS
from autoquant.errors import RunConflict, SourceError
from autoquant.files import set_aside
from autoquant.formats import BF16
from autoquant.measure.calibration import Calibration, calibrate
from autoquant.measure.evaluator import LocalEvaluator
from autoquant.measure.kl import TokenScores
from autoquant.measure.sensitivity import Sensitivity, keys_of
from autoquant.measure.session import Session, open_session
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import Groups
from autoquant.plan.plan import Plan, make_plan
from autoquant.progress import Unit
from autoquant.run.config import SearchConfig
from autoquant.run.confirmation import Confirmed, confirm
from autoquant.run.observer import Observer
from autoquant.run.probes import Probes
from autoquant.run.result import make_result, make_tokens
from autoquant.run.shared import Shared
from autoquant.run.trials import Trials
from autoquant.search.explore import Explored
from autoquant.search.history import History
from autoquant.search.problem import Problem, require_feasible
from autoquant.store.run_directory import (
    ASSIGNMENT,
    CALIBRATION,
    CHECKPOINT,
    GROUPS,
    REPORT,
    RESULT,
    SECONDS,
    SENSITIVITY,
    SPLITS,
    TOKENS,
    RunDirectory,
    read_seconds,
)
from autoquant.tracking import Tracker

if TYPE_CHECKING:
    from autoquant.export.verify import Verification


@dataclass
class Search:
    """One search in one run directory."""

    config: SearchConfig
    run: RunDirectory
    tracker: Tracker
    observer: Observer
    command: str
    """The command line, for the model card."""
    shared: Shared = field(default_factory=Shared)
    """With searches of other budgets."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Spent on each stage, by earlier processes too."""

    def __post_init__(self) -> None:
        try:
            self.seconds |= read_seconds(self.run.path)
        except SourceError as error:
            self.observer.warn(f"{error.message} Times count from here on.")

    def execute(self) -> dict[str, Any]:
        """Run every stage that is not done; the contents of `result.json`.

        Raises:
            InfeasibleBudget: before anything is loaded.
            RunConflict: the text or the tokenizer changed since the run began.
            SourceError: model or text missing, damaged or not understood.
        """
        plan = self._plan()
        limits = self.config.limits(plan)
        require_feasible(plan.accounting, limits)
        finished = self.run.read_json(RESULT)
        if finished is not None:
            self.observer.note(f"{self.run.path} already holds this search's result.")
            self._track_again(finished)
            return self._with_checkpoint(plan, finished)
        self.shared.adopt_probes(self.run)
        session = self._open(plan)
        calibration = self._calibrate(session)
        sensitivity = self._probe(session, plan)
        problem = Problem(
            accounting=plan.accounting, limits=limits, sensitivity=sensitivity.bounded()
        )
        history, explored = self._measure(session, plan, problem)
        confirmed = self._confirm(session, history, explored)
        return self._finish(session, plan, explored.problem, history, calibration, confirmed)

    def probe(self) -> dict[str, Any]:
        """Run the stages up to the probes, whatever the budget; what `sensitivity.json` holds.

        Raises:
            RunConflict: the text or the tokenizer changed since the run began.
            SourceError: model or text missing, damaged or not understood.
        """
        stored = self.run.read_json(SENSITIVITY)
        if stored is not None:
            self.observer.note(f"{self.run.path} already holds these probes.")
            return stored
        plan = self._plan()
        session = self._open(plan)
        self._calibrate(session)
        self._probe(session, plan)
        return self.run.read_json(SENSITIVITY) or {}

    def _plan(self) -> Plan:
        plan = make_plan(self.config.source, self.config.space, self.config.kv_cache)
        for warning in plan.options.warnings:
            self.observer.warn(warning)
        self.run.write_json(GROUPS, plan.to_dict())
        return plan

    def _open(self, plan: Plan) -> Session:
        if self.shared.session is None:
            self.shared.session = self._load(plan)
        session = self.shared.session
        self._require_same_tokens(session)
        for name, split in session.splits.items():
            self.tracker.dataset(
                self.config.calibration, digest=split.digest, context=name, tokens=split.tokens
            )
        return session

    def _load(self, plan: Plan) -> Session:
        with self._timed("load"):
            return open_session(
                self.config.source,
                [g for g in plan.groups if plan.options.choices[g.name] != (BF16,)],
                attention=self.config.kv_cache.attention(plan.groups),
                calibration=self.config.calibration,
                tokens=self.config.tokens,
                mode=self.config.mode,
                device=self.config.device,
                trust_remote_code=self.config.trust_remote_code,
                observer=self.observer,
            )

    def _require_same_tokens(self, session: Session) -> None:
        digests = {name: split.digest for name, split in session.splits.items()}
        stored = self.run.read_json(SPLITS) or {}
        if digests | stored == digests:
            self.run.write_json(SPLITS, digests)
        else:
            raise RunConflict(
                f"{self.run.path} was begun on other tokens: the text {self.config.calibration!r} "
                "or the tokenizer has changed since.",
                fix="restore them, or start anew with --fresh (the earlier run is set aside).",
            )

    def _calibrate(self, session: Session) -> Calibration:
        stored = self.run.read_json(CALIBRATION)
        if stored is not None:
            calibration = Calibration.from_dict(stored)
        else:
            split = session.splits["calibration"]
            self.observer.stage("calibrate", len(split.batches))
            with self._timed("calibrate"):
                calibration = calibrate(
                    session.scorer,
                    split,
                    self.observer.step,
                    all_experts=self.config.tokens.all_experts,
                )
            self.run.write_json(CALIBRATION, calibration.to_dict())
        if (warning := calibration.warning()) is not None:
            self.observer.warn(warning)
        session.quantized.set_input_scales(calibration.scales())
        if session.quantized.kv_cache is not None:
            session.quantized.kv_cache.set_ranges(calibration.kv_ranges)
        return calibration

    def _probe(self, session: Session, plan: Plan) -> Sensitivity:
        probes = Probes(
            run=self.run,
            scorer=session.scorer,
            split=session.splits["search"],
            keys=tuple(keys_of(plan.options.choices)),
            seed=self.config.seed,
            observer=self.observer,
        )
        with self._timed("probe"):
            sensitivity, method = probes.measure(self.config.probe)
        self.run.write_json(SENSITIVITY, {"method": str(method), **sensitivity.to_dict()})
        for group, choice in sensitivity.overflowing():
            self.observer.warn(
                f"{group} in {choice} overflows: its KL is not finite, and it is taken only where "
                "the budget leaves nothing else."
            )
        return sensitivity

    def _measure(self, session: Session, plan: Plan, problem: Problem) -> tuple[History, Explored]:
        """Everything that is measured jointly on the search split."""
        return self._trials().measure(
            self.config,
            problem,
            LocalEvaluator(session.scorer, session.splits["search"]),
            accounting=plan.accounting,
            elsewhere=self.shared.trials(),
            in_time=self._in_time(),
            timed=self._timed,
        )

    def _trials(self) -> Trials:
        return Trials(run=self.run, tracker=self.tracker, observer=self.observer)

    def _confirm(self, session: Session, history: History, explored: Explored) -> Confirmed:
        """Finalists and baselines on the report split."""
        session.scorer.forget(session.splits["search"])
        split = session.splits["report"]
        if split.unit_count < FEWEST_UNITS:
            self.observer.warn(
                f"too few report {split.unit}s to tell assignments apart: {split.unit_count}. From "
                f"{FEWEST_UNITS} on (more text, --report-tokens) one may replace the solver's."
            )
        elif (caution := split.caution()) is not None:
            self.observer.warn(caution)
        with self._timed("confirm"):
            return confirm(
                explored,
                history,
                finalists=self.config.finalists,
                score=lambda assignment: self._score_fully(session, assignment),
                noise=lambda: session.scorer.noise_batch(split, 0).mean,
                seed=self.config.seed,
                observer=self.observer,
            )

    def _score_fully(self, session: Session, assignment: Assignment) -> TokenScores:
        """Scores on the report split; what another budget has confirmed is taken from there."""
        known = self.shared.confirmed
        if assignment.digest not in known:
            split = session.splits["report"]
            known[assignment.digest] = session.scorer.score_fully(assignment, split)
        return known[assignment.digest]

    def _finish(
        self,
        session: Session,
        plan: Plan,
        problem: Problem,
        history: History,
        calibration: Calibration,
        confirmed: Confirmed,
    ) -> dict[str, Any]:
        import yaml

        assignment = confirmed.trial.assignment
        self.run.write_text(ASSIGNMENT, yaml.safe_dump(assignment.to_dict(), sort_keys=False))
        with self._or_warn(TOKENS):
            self.run.write_json(TOKENS, make_tokens(session, confirmed))
        result = make_result(self.config, session, plan, problem, history, calibration, confirmed)
        result["command"] = self.command
        if self.config.export:
            book = session.quantized.book
            result["checkpoint"] = self._export(plan.groups, calibration, assignment, result, book)
        return self._keep_result(result)

    def _keep_result(self, result: dict[str, Any]) -> dict[str, Any]:
        result["seconds"] = {**self.seconds, "total": sum(self.seconds.values())}
        self.run.write_json(RESULT, result)
        self._report()
        stored = self.run.read_json(RESULT)
        assert stored is not None
        self.tracker.result(stored)
        return stored

    def _report(self) -> None:
        from autoquant.report.html import write_report
        from autoquant.report.record import RunRecord

        with self._or_warn(REPORT):
            write_report(RunRecord.read(self.run.path))

    @contextmanager
    def _or_warn(self, name: str) -> Iterator[None]:
        """Go on without a file that the result does not rest on."""
        try:
            yield
        except Exception as error:
            self.observer.warn(f"{name} could not be written: {type(error).__name__}: {error}")

    def _with_checkpoint(self, plan: Plan, result: dict[str, Any]) -> dict[str, Any]:
        """The result of a finished search, exported now if it was not and shall be."""
        if not self.config.export or self._has_checkpoint():
            return result
        calibration = self.run.read_json(CALIBRATION)
        if calibration is None:
            raise SourceError(
                f"{self.run.path} holds a result without {CALIBRATION}, which an export needs.",
                fix="restore the file, or start anew with --fresh (the earlier run is set aside).",
            )
        assignment = Assignment.read(self.run.path / ASSIGNMENT)
        result["checkpoint"] = self._export(
            plan.groups, Calibration.from_dict(calibration), assignment, result
        )
        return self._keep_result(result)

    def _has_checkpoint(self) -> bool:
        """Whether a whole checkpoint is there; a damaged one is set aside."""
        from autoquant.export.complete import why_incomplete

        target = self.run.path / CHECKPOINT
        if not target.exists():
            return False
        damage = why_incomplete(target)
        if damage is not None:
            self.observer.warn(f"{damage} It is kept as {set_aside(target)} and exported again.")
        return damage is None

    def _export(
        self,
        groups: Groups,
        calibration: Calibration,
        assignment: Assignment,
        result: dict[str, Any],
        book: CodeBook | None = None,
    ) -> str:
        from autoquant.export.card import CardFacts, KlRow
        from autoquant.export.declaration import reader_warnings
        from autoquant.export.export import export
        from autoquant.export.verify import verify
        from autoquant.report.words import budgeted, counts_stored_bits, unit_of_budget

        target = self.run.path / CHECKPOINT
        size = self.config.source.headers.bytes
        card = CardFacts(
            command=self.command,
            budget_bpe=self.config.budget.bpe,
            budget_scope=str(self.config.budget.scope),
            budget_unit=unit_of_budget(result),
            budgeted_bpe=None if counts_stored_bits(result) else budgeted(result),
            activation_mode=str(self.config.mode),
            kv_cache=str(self.config.kv_cache),
            text=self.config.calibration,
            tokens=result["tokens"]["report"]["tokens"],
            rows=tuple(
                KlRow(name=row["name"], bpe=row["bpe"], kl=row["kl"], stderr=row["stderr"])
                for row in [_own_row(result), *result["baselines"]]
            ),
        )
        for warning in reader_warnings(self.config.layout, groups, assignment):
            self.observer.warn(warning)
        with self._timed("export"):
            if not self._has_checkpoint():
                self.observer.stage("export", size, Unit.BYTES)
                export(
                    self.config.source,
                    groups,
                    assignment,
                    calibration.input_amax,
                    target,
                    layout=self.config.layout,
                    kv_ranges=calibration.kv_ranges,
                    uncalibrated=calibration.unseen,
                    book=book,
                    card=card,
                    on_bytes=self.observer.step,
                )
            self.observer.stage("verify", size, Unit.BYTES)
            _require_sound(verify(target, self.config.source, on_bytes=self.observer.step))
        return str(target)

    def _track_again(self, finished: dict[str, Any]) -> None:
        """Record what the store did not have when the search ended."""
        self._trials().track()
        self.tracker.result(finished)

    def _in_time(self) -> Callable[[], bool]:
        limit = self.config.max_seconds
        started = time.monotonic() - sum(self.seconds.values())
        return lambda: limit is None or time.monotonic() - started < limit

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started
            self.run.write_json(SECONDS, self.seconds)


def _require_sound(verification: "Verification") -> None:
    if not verification.ok:
        raise SourceError(
            f"{verification.path}: {verification.problems[0]}",
            fix="the disk may have failed: delete the folder and run the same command again.",
        )


def _own_row(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "this checkpoint",
        "bpe": result["bpe"]["checkpoint"],
        "kl": result["kl"]["mean"],
        "stderr": result["kl"]["stderr"],
    }
