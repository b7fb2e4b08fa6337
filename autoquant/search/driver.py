"""The loop of a search: ask a proposer, measure, append to the history, and ask again."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from autoquant.measure.evaluator import Evaluator, Measurement, Request
from autoquant.measure.race import Race
from autoquant.plan.accounting import Accounting
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Scope
from autoquant.search.history import History
from autoquant.search.limits import Bounds
from autoquant.search.propose.proposal import Proposal, Proposer
from autoquant.search.trials import Trial


@dataclass(frozen=True, kw_only=True)
class Driver:
    """Has measured what proposers propose; each trial is kept before the next is measured."""

    history: History
    evaluator: Evaluator
    accounting: Accounting
    """Of the checkpoint, for the size of each candidate."""
    fits: Callable[[Assignment], bool]
    """Whether an assignment keeps the budget."""
    keep: Callable[[Trial], None]
    """Called with each trial that is new to this search, when it is in the history."""
    width: int = 1
    """Proposals that are asked for at a time, for an evaluator that measures so many at once. They
    race against what was the best before them, so that another width may end otherwise."""

    def run(
        self, proposer: Proposer, *, most: int | None = None, bounds: Bounds | None = None
    ) -> bool:
        """Measure what `proposer` proposes until it has no more; False where the bounds ended it.

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
            allowed = [*takewhile(lambda p: self._is_allowed(p, bounds), proposed)]
            for trial in self._trials(allowed):
                self.history.add(trial)
                if self.history.earlier(trial.assignment) is None:
                    self.keep(trial)
            if len(allowed) < len(proposed):
                return False
            left = left and left - len(proposed)
        return True

    def _is_allowed(self, proposal: Proposal, bounds: Bounds | None) -> bool:
        return bounds is None or bounds.allow(self.history, proposal.assignment)

    def _trials(self, proposals: Sequence[Proposal]) -> Iterator[Trial]:
        """Yield the trial of each, what is not known measured, in their order."""
        planned = [self._known(proposal) or self.history.next_number() for proposal in proposals]
        measured = self.evaluator.measure(
            _request(proposal)
            for proposal, plan in zip(proposals, planned, strict=True)
            if not isinstance(plan, Trial)
        )
        for proposal, plan in zip(proposals, planned, strict=True):
            yield plan if isinstance(plan, Trial) else self._trial(plan, proposal, next(measured))

    def _known(self, proposal: Proposal) -> Trial | None:
        """The trial that an earlier process made, or another budget's as this search's own."""
        earlier = self.history.earlier(proposal.assignment)
        other = self.history.elsewhere(proposal.assignment)
        # A race may have stopped where another budget went on, so racers are run again.
        if earlier is not None or other is None or proposal.rival is not None:
            return earlier
        return replace(
            other,
            number=self.history.next_number(),
            stage=proposal.stage,
            name=proposal.name,
            params=proposal.params,
            fits=self.fits(proposal.assignment),
            seconds=0.0,
        )

    def _trial(self, number: int, proposal: Proposal, measurement: Measurement) -> Trial:
        kl, stderr = measurement.kl, measurement.stderr
        if proposal.rival is not None and measurement.gap is not None:
            kl = proposal.rival.kl + measurement.gap.mean
            stderr = measurement.gap.stderr
        return Trial(
            number=number,
            stage=proposal.stage,
            name=proposal.name,
            assignment=proposal.assignment,
            kl=kl,
            stderr=stderr,
            sequence_kl=measurement.sequence_kl,
            tokens=measurement.tokens,
            is_stopped=measurement.is_stopped,
            bpe=self.accounting.bpe(proposal.assignment, Scope.CHECKPOINT),
            fits=self.fits(proposal.assignment),
            seconds=measurement.seconds,
            params=proposal.params,
        )


def _request(proposal: Proposal) -> Request:
    rival = proposal.rival
    race = Race(rival=rival.sequence_kl) if rival is not None else None
    return Request(assignment=proposal.assignment, race=race)
