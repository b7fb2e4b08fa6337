"""Proposers asked one after the other, as the trials of a study say that they were."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from autoquant.plan.assignment import Assignment
from autoquant.search.history import History
from autoquant.search.propose.proposal import Foreseeing, Proposal, Proposer
from autoquant.search.trials import Trial

Shares = Iterable[tuple[Proposer, int]]
"""Proposers that nobody has asked yet, and how many trials each may propose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposed:
    """A proposal, and how many trials it rests on."""

    proposal: Proposal
    seen: int


class Schedule:
    """What comes next after the trials so far.

    Proposals come in rounds: those of one round rest on the same trials, and nothing is proposed
    before all of a round is finished. Proposers go by the histories that they are asked with, so
    going through the trials once more leads to the same round.

    Args:
        shares: in their order.
        width: proposals of a round at most.
    """

    def __init__(self, shares: Shares, width: int) -> None:
        self._history = History()
        self._rounds = self._propose(shares, width)
        self._round: list[Proposed] = []
        """Proposals whose trials are not finished."""
        self._asked: tuple[Proposer, int] | None = None
        """Who proposed the round, and how many more trials it has."""

    def add(self, trial: Trial, *, is_proposed: bool) -> None:
        """Go on by one trial.

        Args:
            trial: finished; the next of the study.
            is_proposed: whether it was asked for here.
        """
        if is_proposed:
            ahead = self.pending()
            self._round = [p for p in ahead if p.proposal.assignment != trial.assignment]
        if trial.assignment not in self._history:
            self._history.add(trial)

    def pending(self) -> Sequence[Proposed]:
        """What is left of this round; of the next where nothing is; empty at the end."""
        if not self._round:
            self._round = next(self._rounds, [])
        return self._round

    def coming(self) -> Sequence[Assignment]:
        """What the rounds after this one propose if its trials change nothing, as far as whoever
        proposed it knows.
        """
        if self._asked is None:
            return ()
        proposer, left = self._asked
        return proposer.ahead(self._history, left) if isinstance(proposer, Foreseeing) else ()

    def _propose(self, shares: Shares, width: int) -> Iterator[list[Proposed]]:
        for proposer, share in shares:
            left = share
            while left > 0:
                found = proposer.propose(self._history, min(width, left))
                if not found:
                    break
                seen = len(self._history.trials)
                left -= len(found)
                self._asked = proposer, left
                yield [Proposed(proposal=proposal, seen=seen) for proposal in found]


Made = Callable[[], Schedule]
"""Makes a schedule that has seen no trial."""
