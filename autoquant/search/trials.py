"""Joint measurements of candidates: each assignment once, each one on disk before the next.

A candidate may race against the best so far: batch after batch their KL is compared in pairs, and
one that is clearly worse is not measured to the end.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from autoquant.arrays import Floats
from autoquant.data.tokens import Split
from autoquant.formats import Choice
from autoquant.measure.kl import TokenKl
from autoquant.measure.scorer import Scorer
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Accounting, Scope

RACE_DEVIATIONS = 3.0
"""Standard errors of the paired difference beyond which a candidate is given up."""
RACE_SEQUENCES = 8
"""Fewest sequences on which a candidate is given up."""


class Stage(StrEnum):
    """Where a candidate came from."""

    BASELINE = "baseline"
    SOLVER = "solver"
    RULES = "rules"
    RUNNER_UP = "runner-up"
    REWEIGHT = "reweight"
    REFIT = "refit"
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
    """Mean, nats per token; of a stopped candidate the rival's plus their mean difference."""
    stderr: float
    """Of `kl`; of a stopped candidate that of the difference."""
    sequence_kl: tuple[float, ...]
    """Mean KL of each sequence measured, nats per token, for paired comparisons."""
    tokens: int
    """Tokens measured."""
    is_stopped: bool
    """Whether it was clearly worse than the best before all tokens were measured."""
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
            "tokens": self.tokens,
            "is_stopped": self.is_stopped,
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
            tokens=data["tokens"],
            is_stopped=data["is_stopped"],
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
        elsewhere: whole trials of other budgets on the same tokens, which need no measuring.
    """

    def __init__(
        self,
        scorer: Scorer,
        split: Split,
        accounting: Accounting,
        fits: Callable[[Assignment], bool],
        earlier: Iterable[Trial],
        keep: Callable[[Trial], None],
        elsewhere: Iterable[Trial] = (),
    ) -> None:
        self._elsewhere = {trial.assignment.digest: trial for trial in elsewhere}
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
        *,
        rival: Trial | None = None,
    ) -> Trial:
        """The trial of `assignment`, measured now unless it already was.

        Args:
            assignment: of every group.
            stage: who proposes it.
            name: what it is in words.
            params: of a reweighting.
            rival: a whole trial to race against; none measures to the end.
        """
        known = self._known.get(assignment.digest)
        if known is not None:
            return known
        trial = self._earlier.get(assignment.digest)
        if trial is None:
            # A race may have stopped where another budget went on, so racers are run again.
            if rival is None:
                trial = self._taken_over(assignment, stage, name, params or {})
            trial = trial or self._measure(assignment, stage, name, params or {}, rival)
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

    @property
    def tokens(self) -> int:
        """Tokens of all trials together."""
        return sum(trial.tokens for trial in self.trials)

    def whole(self) -> list[Trial]:
        """The candidates within the budget that were measured to the end."""
        return [t for t in self.trials if t.fits and not t.is_stopped]

    def best(self) -> Trial:
        """The candidate of least KL that keeps the budget; the earliest of equals."""
        return min(self.whole(), key=lambda t: (t.kl, t.number))

    def _taken_over(
        self, assignment: Assignment, stage: Stage, name: str, params: Mapping[str, float]
    ) -> Trial | None:
        """Another budget's trial of the same assignment, as this search's own."""
        trial = self._elsewhere.get(assignment.digest)
        return trial and replace(
            trial,
            number=len(self.trials),
            stage=stage,
            name=name,
            params=params,
            fits=self._fits(assignment),
            seconds=0.0,
        )

    def _measure(
        self,
        assignment: Assignment,
        stage: Stage,
        name: str,
        params: Mapping[str, float],
        rival: Trial | None,
    ) -> Trial:
        started = time.monotonic()
        parts: list[TokenKl] = []
        gap = None
        for index in range(len(self._split.batches)):
            parts.append(self._scorer.score_batch(assignment, self._split, index))
            if rival is not None and index + 1 < len(self._split.batches):
                gap = _lost(TokenKl.joined(parts), rival)
                if gap is not None:
                    break
        scores = TokenKl.joined(parts)
        kl, stderr = scores.mean, scores.stderr()
        if rival is not None and gap is not None:
            kl, stderr = rival.kl + gap.mean, gap.stderr
        return Trial(
            number=len(self.trials),
            stage=stage,
            name=name,
            assignment=assignment,
            kl=kl,
            stderr=stderr,
            sequence_kl=tuple(map(float, scores.by_sequence())),
            tokens=len(scores.kl),
            is_stopped=gap is not None,
            bpe=self._accounting.bpe(assignment, Scope.CHECKPOINT),
            fits=self._fits(assignment),
            seconds=time.monotonic() - started,
            params=params,
        )


@dataclass(frozen=True, slots=True)
class _Gap:
    """How much worse a candidate is than its rival on the same sequences, nats per token."""

    mean: float
    stderr: float


def _lost(scores: TokenKl, rival: Trial) -> _Gap | None:
    """The gap to the rival, if it is wider than its error allows for equals."""
    sizes, means = scores.tokens_by_sequence(), scores.by_sequence()
    if len(means) < RACE_SEQUENCES:
        return None
    differences: Floats = means - np.array(rival.sequence_kl[: len(means)])
    shares = sizes / sizes.sum()
    mean = float(shares @ differences)
    variance = float(shares**2 @ (differences - mean) ** 2) * len(means) / (len(means) - 1)
    gap = _Gap(mean, math.sqrt(variance))
    return gap if gap.mean > RACE_DEVIATIONS * gap.stderr else None
