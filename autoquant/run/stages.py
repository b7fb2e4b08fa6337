"""The search from headers to a confirmed assignment and its checkpoint.

Only this module and what it calls for the purpose touch the run directory and the tracker; the
stages below are pure given the scorer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoquant.codes.book import CodeBook
from autoquant.data.tokens import FEWEST_UNITS
from autoquant.errors import SourceError
from autoquant.files import set_aside
from autoquant.independent.forward import Evidence
from autoquant.measure.calibration import Calibration
from autoquant.measure.compare import Ahead
from autoquant.measure.kl import TokenScores
from autoquant.measure.sensitivity import Sensitivity
from autoquant.measure.session import Session
from autoquant.measure.statistics.clipping import clipped_by_group, describe_clipped
from autoquant.plan.assignment import Assignment
from autoquant.plan.limit import Limit
from autoquant.plan.plan import loading_warnings
from autoquant.progress import Unit
from autoquant.run.config import SearchConfig
from autoquant.run.confirmation import Confirmed, confirm
from autoquant.run.independent import check_export, make_evidence
from autoquant.run.machines.worker import evaluator_of_search
from autoquant.run.measuring import book_of_run
from autoquant.run.observer import or_warn
from autoquant.run.polishing import Winner, is_polished, make_polish, polished_winner
from autoquant.run.result import make_result, make_tokens
from autoquant.run.sensitivity.probing import Probing
from autoquant.run.signature import FINALISTS, search_name
from autoquant.run.trials import Trials
from autoquant.search.history import History
from autoquant.search.problem import Problem
from autoquant.store.run_directory import (
    ASSIGNMENT,
    CALIBRATION,
    CHECKPOINT,
    HOME,
    REPORT,
    RESULT,
    TOKENS,
    home_of,
)
from autoquant.study.explore import Explored

if TYPE_CHECKING:
    from autoquant.export.verify import Verification


@dataclass(kw_only=True)
class Search(Probing):
    """One search in one run directory."""

    config: SearchConfig
    """Of one budget."""
    limits: tuple[Limit, ...]
    """What every assignment of the search keeps."""
    command: str
    """The command line, for the model card."""

    def execute(self) -> dict[str, Any]:
        """Run every stage that is not done; the contents of `result.json`.

        Raises:
            RunConflict: the text or the tokenizer changed since the run began.
            SourceError: model or text missing, damaged or not understood.
        """
        self._keep_plan()
        finished = self.run.read_json(RESULT)
        if finished is not None:
            self.observer.note(f"{self.run.path} already holds this search's result.")
            self._track_again(finished)
            result = self._with_checkpoint(finished)
            if not self._has_report():
                self._report()
            return result
        self.shared.adopt_probes(self.run)
        home = home_of(self.shared.home(self.run.path))
        if home != self.run.path:
            self.run.write_json(HOME, {"run": home.name})
        session = self._open()
        calibration = self._calibrate(session)
        sensitivity = self._probe(session)
        problem = Problem(
            accounting=self.plan.accounting, limits=self.limits, sensitivity=sensitivity.bounded()
        )
        history, explored = self._measure(session, calibration, problem)
        if (caution := explored.problem.knapsack.solution.caution()) is not None:
            self.observer.warn(caution)
        confirmed = self._confirm(session, history, explored)
        winner = self._polish(session, calibration, Winner.plain(confirmed))
        return self._finish(session, explored.problem, history, calibration, confirmed, winner)

    def _keep_plan(self) -> None:
        for warning in loading_warnings(self.plan.refused_by, self.config.layout):
            self.observer.warn(warning)
        super()._keep_plan()

    def _sensitivity(self, session: Session) -> tuple[Sensitivity, str]:
        state = self.config.modelopt_state
        if state is None:
            return super()._sensitivity(session)
        from autoquant.run.sensitivity.modelopt_scores import METHOD, modelopt_sensitivity

        self.observer.stage("probe", 1)
        found = modelopt_sensitivity(state, session, self.plan)
        self.observer.step()
        return found, METHOD

    def _ahead(self, session: Session) -> Ahead | None:
        """Nothing where ModelOpt's scores take the place of gradients."""
        return None if self.config.modelopt_state is not None else super()._ahead(session)

    def _measure(
        self, session: Session, calibration: Calibration, problem: Problem
    ) -> tuple[History, Explored]:
        """Everything that is measured jointly on the search split."""
        with evaluator_of_search(
            self.config,
            session,
            calibration,
            self.plan.source,
            self.shared.home(self.run.path),
            self.observer,
            self.shared.roster,
        ) as evaluator:
            return self._trials().measure(
                self.config,
                problem,
                evaluator,
                split=session.splits["search"],
                accounting=self.plan.accounting,
                elsewhere=self.shared.trials(),
                in_time=self._in_time(),
                timed=self._timed,
            )

    def _trials(self) -> Trials:
        return Trials(
            run=self.run,
            study_name=search_name(self.config, self.plan),
            storage=self.shared.storage,
            tracker=self.tracker,
            observer=self.observer,
        )

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
                finalists=FINALISTS,
                score=lambda assignments: self._score_fully(session, assignments),
                noise=lambda: session.scorer.noise(split).mean,
                seed=self.config.seed,
                observer=self.observer,
            )

    def _polish(self, session: Session, calibration: Calibration, plain: Winner) -> Winner:
        """The winner, or its polish where that is better beyond the interval."""
        if not self.config.effort.polishes:
            return plain
        with self._timed("polish"):
            return polished_winner(
                session,
                plain,
                calibration,
                score=lambda assignment: session.scorer.score_fully(
                    [assignment], session.splits["report"]
                )[0],
                seed=self.config.seed,
                observer=self.observer,
            )

    def _score_fully(
        self, session: Session, assignments: Sequence[Assignment]
    ) -> list[TokenScores]:
        """Scores on the report split; what another budget has confirmed is taken from there."""
        known, split = self.shared.confirmed, session.splits["report"]
        new = [each for each in assignments if each.digest not in known]
        found = session.scorer.score_fully(new, split, with_noise=True)
        for assignment, scores in zip(new, found, strict=True):
            known[assignment.digest] = scores
        return [known[each.digest] for each in assignments]

    def _finish(
        self,
        session: Session,
        problem: Problem,
        history: History,
        calibration: Calibration,
        confirmed: Confirmed,
        winner: Winner,
    ) -> dict[str, Any]:
        import yaml

        assignment = winner.assignment
        self.run.write_text(ASSIGNMENT, yaml.safe_dump(assignment.to_dict(), sort_keys=False))
        with or_warn(TOKENS, self.observer):
            self.run.write_json(TOKENS, make_tokens(session, confirmed, winner))
        result = make_result(
            self.config, self.plan, session, problem, history, calibration, confirmed, winner
        )
        result["command"] = self.command
        rows = clipped_by_group(session.quantized.groups, winner.scores.clipped)
        result["inputs"] = describe_clipped(rows, calibration.headroom)
        if self.config.export:
            evidence = make_evidence(session, assignment, session.splits["report"])
            book = session.book_of_export(self.plan.source)
            result["checkpoint"] = self._export(calibration, assignment, result, book, evidence)
            found = check_export(
                self.run.path / CHECKPOINT,
                self.plan.source,
                evidence,
                session.loaded.device,
                self.observer,
            )
            result["forward"] = None if found is None else found.to_dict()
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

        with or_warn(REPORT, self.observer):
            write_report(RunRecord.read(self.run.path))

    def _has_report(self) -> bool:
        """Whether there is a report, made from the result that is there."""
        report, result = self.run.path / REPORT, self.run.path / RESULT
        return report.exists() and report.stat().st_mtime_ns >= result.stat().st_mtime_ns

    def _with_checkpoint(self, result: dict[str, Any]) -> dict[str, Any]:
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
        result["command"] = self.command
        book = self._book_of(assignment, result)
        result["checkpoint"] = self._export(
            Calibration.from_dict(calibration), assignment, result, book
        )
        return self._keep_result(result)

    def _book_of(self, assignment: Assignment, result: dict[str, Any]) -> CodeBook:
        """Where the codes of an assignment are; the model is loaded only if they must be made."""
        book = book_of_run(self.plan.source, self.run.path)
        if all(book.has(group, assignment[group.name]) for group in self.plan.groups):
            return book
        session = self._open()
        self._calibrate(session)
        if is_polished(assignment):
            make_polish(session, assignment, result["polish"]["key"], self.observer)
        return session.book_of_export(self.plan.source)

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
        calibration: Calibration,
        assignment: Assignment,
        result: dict[str, Any],
        book: CodeBook,
        evidence: Evidence | None = None,
    ) -> str:
        from autoquant.data.text import text_title
        from autoquant.export.card import CardFacts, KlRow
        from autoquant.export.companions import left_out_note
        from autoquant.export.declaration import reader_warnings
        from autoquant.export.export import export
        from autoquant.export.verify import verify
        from autoquant.report.words import (
            budgeted,
            counts_stored_bits,
            further_limits,
            unit_of_budget,
        )

        target = self.run.path / CHECKPOINT
        source, groups = self.plan.source, self.plan.groups
        size = source.headers.bytes
        card = CardFacts(
            command=self.command,
            budget_bpe=self.config.budget.bpe,
            budget_scope=str(self.config.budget.scope),
            budget_unit=unit_of_budget(result),
            budgeted_bpe=None if counts_stored_bits(result) else budgeted(result),
            further_limits=tuple(further_limits(result)),
            target=str(self.config.served_by),
            kv_cache=str(self.config.kv_cache),
            text=text_title(self.config.text),
            tokens=result["tokens"]["report"]["tokens"],
            rows=tuple(
                KlRow(name=row["name"], bpe=row["bpe"], kl=row["kl"], stderr=row["stderr"])
                for row in [_own_row(result), *_other_rows(result), *result["baselines"]]
            ),
        )
        for warning in reader_warnings(self.config.layout, groups, assignment):
            self.observer.warn(warning)
        with self._timed("export"):
            if not self._has_checkpoint():
                self.observer.stage("export", size, Unit.BYTES)
                exported = export(
                    source,
                    groups,
                    assignment,
                    calibration.ranges(),
                    target,
                    layout=self.config.layout,
                    kv_ranges=calibration.kv_ranges,
                    uncalibrated=calibration.unseen,
                    book=book,
                    card=card,
                    evidence=None if evidence is None else evidence.to_dict(),
                    on_bytes=self.observer.step,
                )
                if (note := left_out_note(exported.left_out)) is not None:
                    self.observer.note(note)
            self.observer.stage("verify", size, Unit.BYTES)
            _require_sound(verify(target, source, on_bytes=self.observer.step))
        return str(target)

    def _track_again(self, finished: dict[str, Any]) -> None:
        """Record what the store did not have when the search ended."""
        self._trials().track()
        self.tracker.result(finished)

    def _in_time(self) -> Callable[[], bool]:
        limit = self.config.max_seconds
        started = time.monotonic() - sum(self.seconds.values())
        return lambda: limit is None or time.monotonic() - started < limit


def _require_sound(verification: "Verification") -> None:
    if not verification.ok:
        raise SourceError(
            f"{verification.path}: {verification.problems[0]}",
            fix="the disk may have failed: delete the folder and run the same command again.",
        )


def _other_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The winner without its polish, or with one that did not gain."""
    found = result.get("polish")
    if found is None:
        return []
    other, name = ("plain", "without") if found["exported"] == "polished" else ("polished", "with")
    row = {"name": f"the same {name} refitted codes", "bpe": result["bpe"]["checkpoint"]}
    return [row | found[other]]


def _own_row(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "this checkpoint",
        "bpe": result["bpe"]["checkpoint"],
        "kl": result["kl"]["mean"],
        "stderr": result["kl"]["stderr"],
    }
