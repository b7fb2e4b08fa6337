"""What measures candidates: requests in, measurements out, in the same order.

A request holds all that its measurement depends on, the race against a rival included, and both are
plain JSON values both ways. So a measurement is the same whoever makes it: this process, a worker,
or the ranks of a distributed program.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from autoquant.files import json_number, read_number
from autoquant.measure.race import Gap, Race
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

    def measure(
        self, requests: Iterable[Request], coming: Sequence[Assignment] = ()
    ) -> Iterator[Measurement]:
        """The measurements, in the order of the requests.

        Args:
            requests: what is asked for.
            coming: what is likely to be asked for next. Measurements do not depend on it.
        """
