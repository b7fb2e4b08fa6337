"""Joint measurements of candidates: each assignment once, each one on disk before the next."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from autoquant.assignment import Assignment
from autoquant.budget import Accounting, Scope
from autoquant.data.tokens import Split
from autoquant.formats import Choice
from autoquant.scoring.scorer import Scorer


class Stage(StrEnum):
    """Where a candidate came from."""

    BASELINE = "baseline"
    SOLVER = "solver"
    RUNNER_UP = "runner-up"
    REWEIGHT = "reweight"
    SWAP = "swap"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One candidate, measured on the search split."""

    number: int
    stage: Stage
    name: str
    """What it is in words: a baseline's name, the rank of a runner-up, the groups of a swap."""
    assignment: Assignment
    kl: float
    """Mean, nats per token."""
    stderr: float
    sequence_kl: tuple[float, ...]
    """Mean KL of each sequence, nats per token, for paired comparisons."""
    bpe: float
    fits: bool
    """Whether it keeps the budget."""
    seconds: float
    params: Mapping[str, float]
    """Parameters of a reweighting; empty for other stages."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "stage": str(self.stage),
            "name": self.name,
            "kl": self.kl,
            "stderr": self.stderr,
            "bpe": self.bpe,
            "fits": self.fits,
            "seconds": self.seconds,
            "digest": self.assignment.digest,
            "params": dict(self.params),
            "sequence_kl": list(self.sequence_kl),
            "groups": {name: str(choice) for name, choice in self.assignment},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Trial":
        groups = {name: Choice.parse(choice) for name, choice in data["groups"].items()}
        return cls(
            number=data["number"],
            stage=Stage(data["stage"]),
            name=data["name"],
            assignment=Assignment.of(groups),
            kl=data["kl"],
            stderr=math.nan if data["stderr"] is None else data["stderr"],
            sequence_kl=tuple(data["sequence_kl"]),
            bpe=data["bpe"],
            fits=data["fits"],
            seconds=data["seconds"],
            params=data["params"],
        )


class Ledger:
    """Measures candidates and remembers them.

    An assignment is measured once, whoever proposes it; an earlier process's trials are taken
    over, so that a resumed search goes on exactly where it stopped.

    Args:
        scorer: calibrated.
        split: the search tokens.
        accounting: for the size of each candidate.
        fits: whether an assignment keeps the budget.
        earlier: trials of an earlier process, in order.
        keep: called with each new trial before the next begins.
    """

    def __init__(
        self,
        scorer: Scorer,
        split: Split,
        accounting: Accounting,
        fits: Callable[[Assignment], bool],
        earlier: Iterable[Trial],
        keep: Callable[[Trial], None],
    ) -> None:
        self._scorer, self._split, self._accounting = scorer, split, accounting
        self._fits, self._keep = fits, keep
        self._earlier = {trial.assignment.digest: trial for trial in earlier}
        self.trials: list[Trial] = []
        self._known: dict[str, Trial] = {}

    def measure(
        self,
        assignment: Assignment,
        stage: Stage,
        name: str,
        params: Mapping[str, float] | None = None,
    ) -> Trial:
        """The trial of `assignment`, measured now unless it already was."""
        known = self._known.get(assignment.digest)
        if known is not None:
            return known
        trial = self._earlier.get(assignment.digest)
        if trial is None:
            trial = self._measure(assignment, stage, name, params or {})
            self._keep(trial)
        self._known[assignment.digest] = trial
        self.trials.append(trial)
        return trial

    def has(self, assignment: Assignment) -> bool:
        """Whether this process has asked for `assignment` before."""
        return assignment.digest in self._known

    def is_measured(self, assignment: Assignment) -> bool:
        """Whether this process or an earlier one has measured `assignment`."""
        return self.has(assignment) or assignment.digest in self._earlier

    def best(self) -> Trial:
        """The candidate of least KL that keeps the budget; the earliest of equals."""
        return min((t for t in self.trials if t.fits), key=lambda t: (t.kl, t.number))

    def _measure(
        self, assignment: Assignment, stage: Stage, name: str, params: Mapping[str, float]
    ) -> Trial:
        started = time.monotonic()
        scores = self._scorer.score(assignment, self._split)
        return Trial(
            number=len(self.trials),
            stage=stage,
            name=name,
            assignment=assignment,
            kl=scores.mean,
            stderr=scores.stderr(),
            sequence_kl=tuple(map(float, scores.by_sequence())),
            bpe=self._accounting.bpe(assignment, Scope.CHECKPOINT),
            fits=self._fits(assignment),
            seconds=time.monotonic() - started,
            params=params,
        )
