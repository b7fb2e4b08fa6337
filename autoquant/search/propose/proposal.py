"""What proposers propose, and what a proposer is."""

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from autoquant.plan.assignment import Assignment
from autoquant.search.history import History
from autoquant.search.trials import Stage, Trial

Named = tuple[str, Assignment] | tuple[str, Assignment, float]
"""What an assignment is in words, the assignment, and its predicted KL where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """An assignment that is worth a joint measurement."""

    assignment: Assignment
    stage: Stage
    name: str
    """What it is in words: a baseline's name, the rank of a runner-up, the groups of a swap."""
    params: Mapping[str, float] = field(default_factory=dict)
    """Of a reweighting."""
    predicted: float | None = None
    """Joint KL, nats per token, by the fit that proposes it."""
    rival: Trial | None = None
    """A trial measured to the end to race against; None measures to the end."""


class Proposer(Protocol):
    """Says what to measure next, from what is known; it measures nothing.

    The same calls with the same histories propose the same, which is what a resumed search rests
    on. What one call proposes is in the history by the next.
    """

    def propose(self, history: History, count: int) -> Sequence[Proposal]:
        """Up to `count` distinct assignments that the history does not hold; none at the end."""


@runtime_checkable
class Foreseeing(Proposer, Protocol):
    """A proposer that knows more than it is asked for: what it proposes next does not rest on every
    measurement.
    """

    def ahead(self, history: History, count: int) -> Sequence[Assignment]:
        """Up to `count` assignments that it would propose next if what is measured until then
        changed nothing. They are none of its proposals yet.
        """


class Ranking:
    """Candidates in their order, of which the next can be looked at before they are taken."""

    def __init__(self, candidates: Iterable[Named] = ()) -> None:
        self._candidates = iter(candidates)
        self._seen: deque[Named] = deque()
        """Looked at and not taken."""

    def __iter__(self) -> Iterator[Named]:
        return self

    def __next__(self) -> Named:
        return self._seen.popleft() if self._seen else next(self._candidates)

    def ahead(self, history: History, count: int) -> list[Assignment]:
        """The next that the history does not hold, up to `count`; none of them is taken."""
        found: dict[str, Assignment] = {}
        place = 0
        while len(found) < count:
            if place == len(self._seen):
                following = next(self._candidates, None)
                if following is None:
                    break
                self._seen.append(following)
            assignment = self._seen[place][1]
            place += 1
            if assignment not in history:
                found[assignment.digest] = assignment
        return list(found.values())


@dataclass(frozen=True)
class Listed:
    """Proposes what a list holds, in its order."""

    stage: Stage
    candidates: Iterator[Named]

    def propose(self, history: History, count: int) -> Sequence[Proposal]:
        return take(self.candidates, history, count, self.stage)


@dataclass(frozen=True)
class Given:
    """Proposes all that several lists hold at once, whatever it is asked for: none of it rests on
    what is measured.
    """

    lists: Sequence[Listed]

    def propose(self, history: History, count: int) -> Sequence[Proposal]:
        found: dict[str, Proposal] = {}
        for own in self.lists:
            for proposal in own.propose(history, sys.maxsize):
                found.setdefault(proposal.assignment.digest, proposal)
        return list(found.values())


def take(
    candidates: Iterable[Named],
    history: History,
    count: int,
    stage: Stage,
    rival: Trial | None = None,
) -> list[Proposal]:
    """Propose the first of the candidates that the history does not hold.

    Args:
        candidates: of an iterator no more is taken than what is looked at.
        history: what is measured.
        count: how many at most.
        stage: whose proposals they are.
        rival: what they race against.
    """
    found: dict[str, Proposal] = {}
    if count > 0:
        for name, assignment, *predicted in candidates:
            if assignment in history or assignment.digest in found:
                continue
            found[assignment.digest] = Proposal(
                assignment=assignment,
                stage=stage,
                name=name,
                predicted=predicted[0] if predicted else None,
                rival=rival,
            )
            if len(found) == count:
                break
    return list(found.values())
