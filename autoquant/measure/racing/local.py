"""What measures candidates in this process: batch by batch where weights are, by waves where each
pass brings them.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from autoquant.data.tokens import Split
from autoquant.measure.evaluator import Measurement, Request
from autoquant.measure.kl import TokenKl
from autoquant.measure.race import Gap, Race
from autoquant.measure.scorer import Scorer
from autoquant.plan.assignment import Assignment

FIRST_WAVE = 1 / 4
"""Of the batches: those who are far behind are out by then, for a quarter of the work."""


@dataclass
class LocalEvaluator:
    """Measures in this process, when a measurement is asked for.

    Where every pass brings the weights, candidates race by waves: one pass scores as many of them
    as memory holds on the first batches, another one those that are left on the others; a single
    pass all of it where passes wait for weights more than they compute. What is likely to be asked
    for next goes along. Races are held batch by batch all the same, on as many of the scores as
    each race takes, so that measurements are those of one request and one batch at a time.
    """

    scorer: Scorer
    """Calibrated."""
    split: Split
    """The search tokens."""
    together: int = 1
    """Requests that go through the blocks together."""
    pairs: int = 0
    """Forwards of a batch that a pass takes which brings the weights; none where they are there."""
    waited: Callable[[], float] = lambda: 0.0
    """Seconds in which passes so far needed weights that had not come."""
    _ahead: dict[str, "_Racer"] = field(default_factory=dict, init=False)
    """What went along and may be asked for yet, by its digest."""
    _is_waiting: bool = field(default=False, init=False)
    """Whether the last pass waited for weights more than it computed."""

    def measure(
        self, requests: Iterable[Request], coming: Sequence[Assignment] = ()
    ) -> Iterator[Measurement]:
        left = iter(requests)
        while asked := [*islice(left, self.together)]:
            yield from self._measure(asked, coming)

    def _measure(
        self, requests: Sequence[Request], coming: Sequence[Assignment]
    ) -> Iterator[Measurement]:
        racers = [self._racer(request) for request in requests]
        if any(not racer.is_done for racer in racers):
            company = self._company(racers, coming)
            while any(not racer.is_done for racer in racers):
                self._pass([racer for racer in (*racers, *company) if not racer.is_done])
            self._ahead |= {racer.digest: racer for racer in company}
        expected = {assignment.digest for assignment in coming}
        self._ahead = {name: own for name, own in self._ahead.items() if name in expected}
        yield from (racer.measurement() for racer in racers)

    def _racer(self, request: Request) -> "_Racer":
        """A request at its start, with what is known of it: its own race is held on that."""
        racer = _Racer(request=request, batches=len(self.split.batches))
        if (known := self._ahead.get(racer.digest)) is not None:
            racer.seconds = known.seconds
            racer.take(known.scores)
        return racer

    def _company(self, racers: Sequence["_Racer"], coming: Sequence[Assignment]) -> list["_Racer"]:
        """What goes along with those that are asked for, as far as one pass takes all of them to
        the first look. They race against the rival of those: when they are asked for, it may be a
        better one, and their own race is held on the same scores.
        """
        if not self.pairs:
            return []
        race = racers[-1].request.race
        most = self.pairs // self._first_look(race) - len(racers)
        asked = {racer.digest for racer in racers}
        new = [each for each in coming if each.digest not in asked]
        return [self._racer(Request(assignment=a, race=race)) for a in new[: max(0, most)]]

    def _pass(self, racers: Sequence["_Racer"]) -> None:
        """Score each on its next batches, in one pass over the blocks."""
        started, waited = time.monotonic(), self.waited()
        every = range(len(self.split.batches))
        at_once = len(next(iter(self.scorer.waves(self.split, every, forwards=len(racers)))))
        by_batch: defaultdict[int, list[_Racer]] = defaultdict(list)
        for racer in racers:
            first = len(racer.scores)
            for index in range(first, min(first + at_once, self._next_look(racer))):
                by_batch[index].append(racer)
        batches = sorted(by_batch)
        assignments = [[racer.request.assignment for racer in by_batch[i]] for i in batches]
        found = self.scorer.score_batches(assignments, self.split, batches)
        taken = time.monotonic() - started
        self._is_waiting = 2 * (self.waited() - waited) > taken
        seconds = taken / sum(map(len, found))
        for index, scores in zip(batches, found, strict=True):
            for racer, score in zip(by_batch[index], scores, strict=True):
                racer.seconds += seconds
                racer.take([score])

    def _next_look(self, racer: "_Racer") -> int:
        """Batches on which a racer is scored before its race decides whether it goes on."""
        look = self._first_look(racer.request.race)
        return look if self.pairs and len(racer.scores) < look else racer.batches

    def _first_look(self, race: Race | None) -> int:
        """Batches of the first wave: a quarter, and as many as a race needs to be lost; all of them
        without a race, and where a second pass would take longer than it saves.
        """
        every = len(self.split.batches)
        if race is None or self._is_waiting:
            return every
        for batches in range(math.ceil(FIRST_WAVE * every), every):
            if len(np.unique(np.concatenate(self.split.units[:batches]))) >= race.fewest:
                return batches
        return every


def fitting(scorer: Scorer, split: Split) -> int:
    """Forwards of a batch that memory holds, where every pass over them brings the weights; none
    where the weights are there.
    """
    most = max(scorer.state_bytes(split, index) for index in range(len(split.batches)))
    return max(1, scorer.room.walk_bytes // most) if scorer.room.is_streamed else 0


@dataclass(slots=True, kw_only=True)
class _Racer:
    """A request with what was measured of it so far."""

    request: Request
    batches: int
    """Of the split."""
    scores: list[TokenKl] = field(default_factory=list)
    """Of the first batches, which may be more than the race took."""
    seconds: float = 0.0
    gap: Gap | None = None
    taken: int = 0
    """Batches that the race took."""

    @property
    def digest(self) -> str:
        return self.request.assignment.digest

    @property
    def is_done(self) -> bool:
        return self.gap is not None or len(self.scores) == self.batches

    def take(self, scores: Sequence[TokenKl]) -> None:
        """Take the next batches in, and look at the race after each until it is lost."""
        self.scores.extend(scores)
        while self.gap is None and self.taken < len(self.scores):
            self.taken += 1
            if self.request.race is not None and self.taken < self.batches:
                self.gap = self.request.race.lost(TokenKl.joined(self.scores[: self.taken]))

    def measurement(self) -> Measurement:
        """What came of it."""
        scores = TokenKl.joined(self.scores[: self.taken])
        return Measurement(
            kl=scores.mean,
            stderr=scores.stderr() if math.isfinite(scores.mean) else math.nan,
            sequence_kl=tuple(map(float, scores.by_sequence())),
            sequence_tokens=tuple(map(int, scores.tokens_by_sequence())),
            gap=self.gap,
            seconds=self.seconds,
        )
