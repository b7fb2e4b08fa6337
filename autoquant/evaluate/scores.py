"""What tasks say of assignments, item by item, and how two of them differ on the same items."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from autoquant.errors import SourceError
from autoquant.measure.uncertainty import NORMAL_95


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One figure of a task, and what its items contribute."""

    name: str
    """As the harness calls it: `acc`, `acc_norm`, `exact_match (strict-match)`."""
    value: float
    higher_is_better: bool
    items: tuple[float, ...] = ()
    """Of each item, in their order, where the figure is their mean; else empty."""

    @property
    def stderr(self) -> float | None:
        """Standard error of a mean over items that are independent draws; None without them."""
        if len(self.items) < 2:
            return None
        return float(np.std(self.items, ddof=1)) / math.sqrt(len(self.items))


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One assignment on one task."""

    name: str
    """Of the assignment: `bf16`, `winner`, a recipe or a file."""
    assignment: str
    """Its digest."""
    task: str
    items: int
    digest: str
    """Of the items with their prompts: first 16 hex digits of a SHA-256."""
    shots: int
    metrics: tuple[Metric, ...]

    def metric(self, name: str) -> Metric | None:
        return next((metric for metric in self.metrics if metric.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any], origin: str) -> Self:
        """What `to_dict` gave.

        Raises:
            SourceError: something is missing or is of another kind.
        """
        try:
            metrics = tuple(
                Metric(**own | {"items": tuple(map(float, own["items"]))})
                for own in data["metrics"]
            )
            return cls(**{**data, "metrics": metrics})
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(
                f"{origin} is damaged: a score of a task lacks {error}.",
                fix="remove the file and evaluate again.",
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """The mean over items of one assignment's figure less another's."""

    mean: float
    low: float
    high: float


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> PairedDifference | None:
    """The difference of two means over the same items, with its 95 % interval; None of one item.

    The items are the sample, and each is answered by both models, so that what is hard for both
    cancels: with d_i = ours_i - theirs_i, the interval is mean(d) +- 1.96 * std(d) / sqrt(n), with
    the sample's standard deviation (E. Miller, Adding Error Bars to Evals, arXiv:2411.00640, 2024,
    section 4.2: paired differences). It is narrower than two intervals side by side by what the
    models' answers correlate.

    Args:
        ours: a figure of each item.
        theirs: of the same items, in the same order.
    """
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    if len(differences) < 2:
        return None
    mean = float(differences.mean())
    half = NORMAL_95 * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return PairedDifference(mean=mean, low=mean - half, high=mean + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """A line of the table: one figure of an assignment, beside another's on the same items."""

    score: TaskScore
    metric: Metric
    to_base: PairedDifference | None
    """None of the other itself, and where it was not evaluated on these items."""

    def to_dict(self, other: str) -> dict[str, Any]:
        """As JSON values, without the items.

        Args:
            other: what the one is called that it is held against.
        """
        return {
            "task": self.score.task,
            "items": self.score.items,
            "metric": self.metric.name,
            "value": self.metric.value,
            "stderr": self.metric.stderr,
            f"to_{other}": None if self.to_base is None else asdict(self.to_base),
        }


def rows_of(scores: Iterable[TaskScore], baseline: str | None) -> list[TaskRow]:
    """The table of scores: by task and figure, each assignment beside the one called `baseline`.

    Args:
        scores: of several assignments.
        baseline: whom each is held against; the first of those on the same items if None.
    """
    scores = list(scores)
    places = dict.fromkeys((s.task, s.digest, m.name) for s in scores for m in s.metrics)
    rows = []
    for task, digest, name in places:
        same = [s for s in scores if (s.task, s.digest) == (task, digest) and s.metric(name)]
        base = next((s for s in same if baseline in (s.name, None)), None)
        rows += [_row(score, base, name) for score in same]
    return rows


def _row(score: TaskScore, base: TaskScore | None, name: str) -> TaskRow:
    metric = score.metric(name)
    assert metric is not None
    theirs = base.metric(name) if base is not None and base is not score else None
    pairs = theirs is not None and metric.items and len(metric.items) == len(theirs.items)
    difference = (
        paired_difference(metric.items, theirs.items) if pairs and theirs is not None else None
    )
    return TaskRow(score=score, metric=metric, to_base=difference)


def merged(old: Iterable[TaskScore], new: Iterable[TaskScore]) -> list[TaskScore]:
    """Both, where `new` takes the place of scores of the same assignment on the same items."""
    found = {(s.name, s.assignment, s.task, s.digest): s for s in (*old, *new)}
    return list(found.values())
