"""The polish of a search's winner, and which of the two is exported."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoquant.errors import ConfigError, RunConflict
from autoquant.formats import BF16, REFIT
from autoquant.measure.calibration import Calibration
from autoquant.measure.kl import TokenScores
from autoquant.measure.polish.visitor import use_polish
from autoquant.measure.session import Session
from autoquant.measure.statistics.weighing import input_sets
from autoquant.plan.assignment import Assignment
from autoquant.progress import Progress
from autoquant.run.confirmation import Confirmed
from autoquant.run.measuring import warn_of_row_weights
from autoquant.run.signature import NUMERICS_VERSION
from autoquant.search.confirm import Difference, paired_difference
from autoquant.store.run_directory import (
    ASSIGNMENT,
    CHECKPOINT,
    RESULT,
    read_identity,
    read_json,
)

VERSION = 4
"""Raised when a polish would make other codes from the same assignment and tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Polished:
    """A winner and its polish on the report tokens."""

    key: str
    """Names the refitted codes."""
    plain: TokenScores
    polished: TokenScores
    difference: Difference
    """Of the polished one to the plain one."""

    def to_dict(self) -> dict[str, Any]:
        """As `result.json` holds it."""
        return {
            "key": self.key,
            **{
                name: {"kl": scores.mean, "stderr": scores.stderr()}
                for name, scores in (("plain", self.plain), ("polished", self.polished))
            },
            "difference": {
                "mean": self.difference.mean,
                "low": self.difference.low,
                "high": self.difference.high,
            },
            "exported": "polished" if self.difference.is_gain else "plain",
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Winner:
    """What is exported, and its scores on the report tokens."""

    assignment: Assignment
    scores: TokenScores
    polish: Polished | None = None
    """Where there was one, whether it won or not."""

    @classmethod
    def plain(cls, confirmed: Confirmed) -> "Winner":
        """The winner of the confirmation as it was searched."""
        scores = confirmed.scores[confirmed.winner]
        return cls(assignment=confirmed.trial.assignment, scores=scores)


def polished_winner(
    session: Session,
    plain: Winner,
    calibration: Calibration,
    *,
    score: Callable[[Assignment], TokenScores],
    seed: int,
    observer: Progress,
) -> Winner:
    """Polish a winner; the better of both by the paired difference on the report tokens.

    Args:
        session: calibrated.
        plain: the winner as it was searched.
        calibration: of the session.
        score: an assignment on the report split.
        seed: of the resampling.
        observer: told of progress.
    """
    assignment = polished_assignment(plain.assignment)
    if assignment == plain.assignment:
        return plain
    key = polish_key(session, plain.assignment, calibration)
    make_polish(session, assignment, key, observer)
    scores = score(assignment)
    if not math.isfinite(scores.mean):
        observer.warn("the polished winner overflows: the assignment stays as it was searched.")
        return plain
    difference = paired_difference(scores, plain.scores, seed=seed)
    found = Polished(key=key, plain=plain.scores, polished=scores, difference=difference)
    better = replace(plain, assignment=assignment, scores=scores)
    return replace(better if difference.is_gain else plain, polish=found)


def make_polish(session: Session, assignment: Assignment, key: str, observer: Progress) -> None:
    """Use the refitted codes of an assignment, and make those that are not kept.

    Args:
        session: calibrated.
        assignment: the polished one.
        key: as `polish_key` gave it.
        observer: told of progress.
    """
    scorer, split = session.scorer, session.splits["calibration"]
    if session.quantized.book.polish not in (None, key):
        scorer.forget(session.splits["report"])  # states of other codes under the same choices
    groups = [own for own in session.quantized.groups if assignment[own.name].rounding == REFIT]
    statistics = session.statistics
    is_said = statistics is None or statistics.rows(input_sets(groups)) is not None
    observer.stage("polish", scorer.trunk.stages)
    use_polish(scorer, split, assignment, key, advance=observer.step)
    if statistics is not None and not is_said:
        warn_of_row_weights(statistics, groups, observer)


def polished_assignment(assignment: Assignment) -> Assignment:
    """The same formats, scale rules and inputs with refitted codes wherever there are such."""
    return Assignment.of({name: choice.refitted for name, choice in assignment})


def is_polished(assignment: Assignment) -> bool:
    """Whether some group has refitted codes."""
    return any(choice.rounding == REFIT for _, choice in assignment)


def require_codes(assignment: Assignment, run: Path | None) -> None:
    """Return if the codes of an assignment may be those of a run, and refitted ones its winner's.

    Args:
        assignment: to be measured or exported.
        run: whose codes are used; None where it is measured without a run.

    Raises:
        ConfigError: no polish has made its codes.
        RunConflict: this version would make other codes than the run's.
        SourceError: a file of the run is damaged.
    """
    if run is not None:
        _require_numerics(assignment, run)
    if not is_polished(assignment):
        return
    group, choice = next((g, c) for g, c in assignment if c.rounding == REFIT)
    belong = (
        f"the assignment names refitted codes ({group}: {choice}), which belong to the polished "
        "winner of a search"
    )
    if run is None:
        raise ConfigError(
            f"{belong}.",
            fix="name the checkpoint of that search instead, or its run directory in `evaluate` "
            "and with `export --calibrated`; or write gptq for refit.",
        )
    if (read_json(run, RESULT) or {}).get("polish") is None:
        raise ConfigError(
            f"{belong}, and {run} has none.",
            fix="search with --effort max, or write gptq for refit.",
        )
    theirs = dict(polished_assignment(Assignment.read(run / ASSIGNMENT)))
    for name in dict(assignment).keys() | theirs.keys():
        own, other = (dict(each).get(name, BF16) for each in (assignment, theirs))
        if own != other:
            raise ConfigError(
                f"{belong}, and that of {run} is another: {name} is {other} there, and {own} here.",
                fix=f"take {run / ASSIGNMENT} as it is, or write gptq for refit.",
            )


def _require_numerics(assignment: Assignment, run: Path) -> None:
    """Fitted codes of other numerics are not found, and would be made otherwise now."""
    identity = read_identity(run)
    theirs = None if identity is None else identity["signature"].get("numerics")
    if identity is None or theirs == NUMERICS_VERSION:
        return
    if any(choice.format.is_costly(choice) for _, choice in assignment):
        raise RunConflict(
            f"{run} is of another version of AutoQuant (numerics {theirs} there, "
            f"{NUMERICS_VERSION} here), whose codes fitted to inputs are others.",
            fix=f"name its checkpoint ({run / CHECKPOINT}), which has them, or search anew.",
        )


def polish_key(session: Session, assignment: Assignment, calibration: Calibration) -> str:
    """A digest of all that the refitted codes of an assignment depend on, the model aside."""
    said = [
        VERSION,
        assignment.digest,
        session.splits["calibration"].digest,
        str(session.quantized.mode),
        session.quantized.kv_cache is not None,
        calibration.ranges(),
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
