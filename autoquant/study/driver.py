"""The loop of a search: ask the study, measure, tell it, and ask again."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from autoquant.measure.evaluator import Evaluator, Measurement, Request
from autoquant.plan.accounting import Accounting
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Scope
from autoquant.search.history import History
from autoquant.search.limits import Bounds
from autoquant.search.propose.proposal import Proposal, Proposer
from autoquant.search.trials import Stage, Trial
from autoquant.study.live import Asked, LiveStudy


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A proposal and the trial that was asked for it."""

    asked: Asked
    proposal: Proposal
    seen: int | None = None
    """Trials that a sampler's proposal rests on."""


@dataclass(frozen=True, kw_only=True)
class Driver:
    """Has measured what is asked for; each trial is kept before the next is measured."""

    study: LiveStudy
    history: History
    """Of the study's trials, each assignment once."""
    evaluator: Evaluator
    accounting: Accounting
    """Of the checkpoint, for the size of each candidate."""
    fits: Callable[[Assignment], bool]
    """Whether an assignment keeps the budget."""
    keep: Callable[[Trial], None]
    """Called with each new trial, when it is in the history."""
    width: int = 1
    """Proposals that are asked for at a time, for an evaluator that measures so many at once. They
    race against what was the best before them, so that another width may end otherwise."""

    def run(
        self, proposer: Proposer, *, most: int | None = None, bounds: Bounds | None = None
    ) -> bool:
        """Enqueue and measure what `proposer` proposes; False where the bounds ended it.

        Args:
            proposer: says what to measure.
            most: trials; any number by default.
            bounds: time and tokens.
        """
        left = most
        while left is None or left > 0:
            count = self.width if left is None else min(self.width, left)
            proposed = proposer.propose(self.history, count)
            if not proposed:
                break
            allowed = [*takewhile(lambda _: self._is_allowed(bounds), proposed)]
            self._measure(
                [_Planned(asked=self.study.enqueued(p.assignment), proposal=p) for p in allowed]
            )
            if len(allowed) < len(proposed):
                return False
            left = left and left - len(proposed)
        return True

    def sample(self, most: int, bounds: Bounds) -> None:
        """Measure what the study's sampler asks for, until it has no more or the bounds end it.

        Args:
            most: trials that a sampler of others asks for.
            bounds: time and tokens.
        """
        while True:
            planned = []
            for _ in range(self._asks(most)):
                if not bounds.allow(self.history):
                    break
                planned.append(self._asked())
            if not planned:
                return
            self._measure(planned, self.study.coming())

    def _asks(self, most: int) -> int:
        """How many trials are asked for before any of them is told."""
        pending = self.study.pending()
        if pending is not None:
            return len(pending)
        return min(self.width, most - self.study.count(Stage.SAMPLER))

    def _asked(self) -> _Planned:
        """Ask for one trial, and what its sampler says of it."""
        pending, seen = self.study.pending(), len(self.history.trials)
        asked = self.study.ask()
        if pending is not None:
            return _Planned(asked=asked, proposal=pending[0].proposal, seen=pending[0].seen)
        proposal = Proposal(
            assignment=self.study.assignment(asked),
            stage=Stage.SAMPLER,
            name=f"ask {asked.number}",
            rival=self.history.best(),
        )
        return _Planned(asked=asked, proposal=proposal, seen=seen)

    def _is_allowed(self, bounds: Bounds | None) -> bool:
        return bounds is None or bounds.allow(self.history)

    def _measure(self, planned: Sequence[_Planned], coming: Sequence[Assignment] = ()) -> None:
        for plan, trial in zip(planned, self._trials(planned, coming), strict=True):
            self.study.tell(plan.asked, trial)
            if trial.assignment not in self.history:
                self.history.add(trial)
            self.keep(trial)

    def _trials(self, planned: Sequence[_Planned], coming: Sequence[Assignment]) -> Iterator[Trial]:
        """Yield the trial of each, what needs it measured, in their order."""
        known = [self._known(plan) for plan in planned]
        requests = [
            self._request(plan) for plan, trial in zip(planned, known, strict=True) if trial is None
        ]
        measured = self.evaluator.measure(requests, coming)
        for plan, trial in zip(planned, known, strict=True):
            yield trial if trial is not None else self._trial(plan, next(measured))

    def _request(self, plan: _Planned) -> Request:
        rival = plan.proposal.rival
        race = self.study.race(plan.asked, None if rival is None else rival.number)
        return Request(assignment=plan.proposal.assignment, race=race)

    def _known(self, plan: _Planned) -> Trial | None:
        """The trial of what need not be measured."""
        proposal, number = plan.proposal, plan.asked.number
        assignment = proposal.assignment
        if proposal.stage is Stage.SAMPLER and not self.fits(assignment):
            return self._unmeasured(plan, "over the budget")
        if assignment in self.history:
            return self._unmeasured(plan, f"repeats trial {self.history[assignment].number}")
        other = self.history.elsewhere(assignment)
        # A race may have stopped where another budget went on, so racers are run again.
        if other is None or proposal.rival is not None:
            return None
        return replace(
            other,
            number=number,
            stage=proposal.stage,
            name=proposal.name,
            params=proposal.params,
            predicted=proposal.predicted,
            rival=None,
            seen=plan.seen,
            fits=self.fits(assignment),
            seconds=0.0,
        )

    def _unmeasured(self, plan: _Planned, why: str) -> Trial:
        """A trial that tells a sampler that what it asked for is not measured."""
        return self._made(
            plan,
            name=f"{plan.proposal.name}: {why}",
            kl=math.nan,
            stderr=math.nan,
            sequence_kl=(),
            tokens=0,
            is_stopped=False,
            seconds=0.0,
        )

    def _trial(self, plan: _Planned, measurement: Measurement) -> Trial:
        kl, stderr, rival = measurement.kl, measurement.stderr, plan.proposal.rival
        if rival is not None and measurement.gap is not None:
            kl = rival.kl + measurement.gap.mean
            stderr = measurement.gap.stderr
        return self._made(
            plan,
            name=plan.proposal.name,
            kl=kl,
            stderr=stderr,
            sequence_kl=measurement.sequence_kl,
            tokens=measurement.tokens,
            is_stopped=measurement.is_stopped,
            seconds=measurement.seconds,
        )

    def _made(self, plan: _Planned, **measured: object) -> Trial:
        proposal = plan.proposal
        return Trial(
            number=plan.asked.number,
            stage=proposal.stage,
            assignment=proposal.assignment,
            bpe=self.accounting.bpe(proposal.assignment, Scope.CHECKPOINT),
            fits=self.fits(proposal.assignment),
            params=proposal.params,
            predicted=proposal.predicted,
            rival=None if proposal.rival is None else proposal.rival.number,
            seen=plan.seen,
            **measured,  # type: ignore[arg-type]
        )
