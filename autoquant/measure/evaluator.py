"""What measures candidates: requests in, measurements out, in the same order.

A request holds all that its measurement depends on, the race against a rival included, and both are
plain JSON values both ways. So a measurement is the same whoever makes it: this process, a worker,
or the ranks of a distributed program.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, Self

from autoquant.data.tokens import Split
from autoquant.files import json_number, read_number
from autoquant.measure.kl import TokenKl
from autoquant.measure.race import Gap, Race
from autoquant.measure.scorer import Scorer
from autoquant.plan.assignment import Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One assignment to be measured jointly."""

    assignment: Assignment
    race: Race | None = None
    """None measures to the end."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "assignment": self.assignment.to_dict(),
            "race": self.race.to_dict() if self.race is not None else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        race = data["race"]
        return cls(
            assignment=Assignment.from_dict(data["assignment"]),
            race=Race.from_dict(race) if race is not None else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The KL of one assignment on the tokens that were measured, sequences in the split's order."""

    kl: float
    """Mean over the tokens, nats per token; not finite where the model's output overflows."""
    stderr: float
    """Of `kl`, nats per token; NaN where that is not finite, or of a single sequence."""
    sequence_kl: tuple[float, ...]
    """Mean of each sequence, nats per token."""
    sequence_tokens: tuple[int, ...]
    gap: Gap | None
    """By how much a lost race was lost; None for what was measured to the end."""
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens measured."""
        return sum(self.sequence_tokens)

    @property
    def is_stopped(self) -> bool:
        """Whether the race was lost before all tokens were measured."""
        return self.gap is not None

    def to_dict(self) -> dict[str, Any]:
        return {
            "kl": json_number(self.kl),
            "stderr": json_number(self.stderr),
            "sequence_kl": [json_number(kl) for kl in self.sequence_kl],
            "sequence_tokens": list(self.sequence_tokens),
            "gap": self.gap.to_dict() if self.gap is not None else None,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        gap = data["gap"]
        return cls(
            kl=read_number(data["kl"]),
            stderr=read_number(data["stderr"]),
            sequence_kl=tuple(map(read_number, data["sequence_kl"])),
            sequence_tokens=tuple(data["sequence_tokens"]),
            gap=Gap.from_dict(gap) if gap is not None else None,
            seconds=data["seconds"],
        )


class Evaluator(Protocol):
    """Measures candidates of one calibrated model on the search tokens."""

    def measure(self, requests: Iterable[Request]) -> Iterator[Measurement]:
        """The measurements, in the order of the requests."""


@dataclass(frozen=True)
class LocalEvaluator:
    """Measures in this process, when a measurement is asked for."""

    scorer: Scorer
    """Calibrated."""
    split: Split
    """The search tokens."""
    together: int = 1
    """Requests that go through the blocks together."""

    def measure(self, requests: Iterable[Request]) -> Iterator[Measurement]:
        left = iter(requests)
        while asked := [*islice(left, self.together)]:
            yield from self._measure(asked)

    def _measure(self, requests: Sequence[Request]) -> Iterator[Measurement]:
        started = time.monotonic()
        raced = [_Raced(request) for request in requests]
        every = range(len(self.split.batches))
        for wave in self.scorer.waves(self.split, every, forwards=len(raced)):
            running = [each for each in raced if each.gap is None]
            assignments = [each.request.assignment for each in running]
            if not running:
                break
            for index, scores in zip(
                wave, self.scorer.score_batches(assignments, self.split, wave), strict=True
            ):
                for each, score in zip(running, scores, strict=True):
                    each.add(score, is_last=index == every[-1])
        seconds = (time.monotonic() - started) / len(raced)
        yield from (each.measurement(seconds) for each in raced)


def fitting(scorer: Scorer, split: Split) -> int:
    """Forwards of a batch that memory holds, where every pass over them brings the weights; one
    where the weights are there.
    """
    most = max(scorer.state_bytes(split, index) for index in range(len(split.batches)))
    return max(1, scorer.room.walk_bytes // most) if scorer.room.is_streamed else 1


@dataclass(slots=True)
class _Raced:
    """A request with what was measured of it so far."""

    request: Request
    parts: list[TokenKl] = field(default_factory=list)
    gap: Gap | None = None

    def add(self, score: TokenKl, *, is_last: bool) -> None:
        """Take the next batch in, unless the race was lost before it."""
        if self.gap is not None:
            return
        self.parts.append(score)
        if self.request.race is not None and not is_last:
            self.gap = self.request.race.lost(TokenKl.joined(self.parts))

    def measurement(self, seconds: float) -> Measurement:
        """What came of it, in so many seconds."""
        scores = TokenKl.joined(self.parts)
        return Measurement(
            kl=scores.mean,
            stderr=scores.stderr() if math.isfinite(scores.mean) else math.nan,
            sequence_kl=tuple(map(float, scores.by_sequence())),
            sequence_tokens=tuple(map(int, scores.tokens_by_sequence())),
            gap=self.gap,
            seconds=seconds,
        )
