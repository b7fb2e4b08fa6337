"""All that tasks have said of one model, and its form as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from autoquant.errors import SourceError
from autoquant.evaluate.scores import TaskRow, TaskScore, merged, rows_of
from autoquant.plan.assignment import Assignment

BASELINE = "bf16"
"""The name of the model as it is, which others are held against."""


WINNER = "winner"
"""The name of what a search chose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An assignment that tasks were run on."""

    name: str
    digest: str
    bpe: float
    """Stored bits per element of the checkpoint."""
    kl: float | None
    """Mean on the report tokens, nats per token; None where it was not measured on them."""
    stderr: float | None

    @classmethod
    def bf16(cls, bpe: float) -> Self:
        """The model as it is, which is at no distance from itself."""
        return cls(name=BASELINE, digest=Assignment.of({}).digest, bpe=bpe, kl=0.0, stderr=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Tasks on assignments of one model."""

    model: str
    target: str
    """The machine that serves, hence which inputs are quantized."""
    candidates: tuple[Candidate, ...]
    scores: tuple[TaskScore, ...]

    def rows(self) -> list[TaskRow]:
        """The table, each figure beside that of BF16 on the same items."""
        return rows_of(self.scores, BASELINE)

    def table(self) -> list[dict[str, Any]]:
        """The lines of the table as JSON values, without the items."""
        found = []
        for row in self.rows():
            candidate = self.candidate(row.score.name)
            found.append(
                {
                    "name": row.score.name,
                    "bpe": None if candidate is None else candidate.bpe,
                    "kl": None if candidate is None else candidate.kl,
                    "digest": row.score.digest,
                    **row.to_dict(BASELINE),
                }
            )
        return found

    def candidate(self, name: str) -> Candidate | None:
        return next((own for own in self.candidates if own.name == name), None)

    def with_(self, other: Self) -> Self:
        """Both, where `other` takes the place of what it has measured again."""
        candidates = {own.name: own for own in (*self.candidates, *other.candidates)}
        return type(self)(
            model=other.model,
            target=other.target,
            candidates=tuple(candidates.values()),
            scores=tuple(merged(self.scores, other.scores)),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "target": self.target,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "scores": [score.to_dict() for score in self.scores],
        }

    @classmethod
    def of(cls, data: Mapping[str, Any], origin: str) -> Self:
        """What `to_dict` gave.

        Raises:
            SourceError: something is missing or is of another kind.
        """
        try:
            return cls(
                model=data["model"],
                target=data["target"],
                candidates=tuple(Candidate(**own) for own in data["candidates"]),
                scores=tuple(TaskScore.of(own, origin) for own in data["scores"]),
            )
        except (KeyError, TypeError) as error:
            raise SourceError(
                f"{origin} is damaged: it lacks {error}.",
                fix="remove the file and evaluate again.",
            ) from error
