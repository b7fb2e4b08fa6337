"""Sensitivities: the KL of every (group, choice), measured one group at a time from BF16."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from autoquant.arrays import Integers
from autoquant.data.tokens import Split
from autoquant.files import json_number, read_number
from autoquant.formats import BF16, Choice
from autoquant.measure.interactions import Interactions, Key, SketchBook
from autoquant.measure.kl import TokenKl
from autoquant.measure.scorer import Scorer
from autoquant.measure.uncertainty import UnitTotals


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProbe:
    """One probe on one batch: the unit that is written to disk."""

    batch: int
    group: str
    choice: Choice
    kl_sum: float
    """Nats, summed over the batch's tokens; not finite where the model's output overflows."""
    tokens: int
    sequence_kl: tuple[float, ...]
    """Mean KL of each sequence, nats per token."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "group": self.group,
            "choice": str(self.choice),
            "kl_sum": json_number(self.kl_sum),
            "tokens": self.tokens,
            "sequence_kl": [json_number(kl) for kl in self.sequence_kl],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "BatchProbe":
        return cls(
            batch=data["batch"],
            group=data["group"],
            choice=Choice.parse(data["choice"]),
            kl_sum=read_number(data["kl_sum"]),
            tokens=data["tokens"],
            sequence_kl=tuple(map(read_number, data["sequence_kl"])),
        )


@dataclass(frozen=True)
class Sensitivity:
    """Mean KL of each (group, choice) over the search split, nats per token; BF16 is zero."""

    kl: Mapping[Key, float]
    """Not finite where the model's output overflows."""
    stderr: Mapping[Key, float] = field(repr=False)
    """Standard error, documents (or passages) taken as independent."""
    interactions: Interactions | None = field(default=None, repr=False)
    """How probes add up, where it was measured."""
    estimate: Mapping[Key, float] | None = field(default=None, repr=False)
    """What gradients alone say, nats per token, where they chose what to measure."""

    def __getitem__(self, key: Key) -> float:
        return 0.0 if key[1] == BF16 else self.kl[key]

    def overflowing(self) -> list[Key]:
        """The pairs whose KL is not finite."""
        return [key for key, kl in self.kl.items() if not math.isfinite(kl)]

    def bounded(self) -> Self:
        """The same with a KL that is not finite above what all others have together.

        So a solver of sums takes such a pair only where the budget leaves nothing else.
        """
        estimate = self.estimate
        return replace(
            self,
            kl=_bounded(self.kl),
            estimate=_bounded(estimate) if estimate is not None else None,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "unit": "nats per token",
            "probes": [
                {"group": g, "choice": str(c), "kl": json_number(kl), "stderr": self.stderr[g, c]}
                for (g, c), kl in self.kl.items()
            ],
        }


def probe(
    scorer: Scorer,
    split: Split,
    keys: Sequence[Key],
    done: Iterable[BatchProbe],
    keep: Callable[[BatchProbe], None],
    sketches: SketchBook | None = None,
    *,
    batches: Sequence[int] | None = None,
) -> Sensitivity:
    """Measure every key on every batch that is not done yet.

    Args:
        scorer: calibrated.
        split: the search tokens.
        keys: (group, choice) pairs, BF16 excluded.
        done: batch probes of an earlier process.
        keep: called with each new batch probe before the next begins.
        sketches: of these keys; without them the interactions of groups stay unknown.
        batches: of the split that are measured; all of them unless named.
    """
    sketch = sketches.sketch if sketches else None
    results = {(p.batch, p.group, p.choice): p for p in done}
    batches = range(len(split.batches)) if batches is None else batches
    missing = {batch: [key for key in keys if (batch, *key) not in results] for batch in batches}
    wanted = [(batch, key) for batch, left in missing.items() for key in left]
    for probed in scorer.probe(split, wanted, sketch) if wanted else ():
        batch, key = probed.batch, probed.key
        if sketches:
            sketches.put(batch, key, probed.sketch)
        result = batch_probe(batch, *key, probed.kl)
        keep(result)
        results[batch, *key] = result
        missing[batch].remove(key)
        if sketches and not missing[batch]:
            sketches.finish(batch)
    if sketches:
        for batch in batches:
            sketches.finish(batch)  # where a killed process had all of its sketches
    kl, stderr = summarize(keys, split, (p for p in results.values() if p.batch in batches))
    found = sketches.interactions(len(split.batches)) if sketches else None
    return Sensitivity(kl, stderr, found)


def batch_probe(batch: int, group: str, choice: Choice, score: TokenKl) -> BatchProbe:
    """The record of one probe's KL on a batch."""
    return BatchProbe(
        batch=batch,
        group=group,
        choice=choice,
        kl_sum=float(score.kl.sum()),
        tokens=len(score.kl),
        sequence_kl=tuple(map(float, score.by_sequence())),
    )


def summarize(
    keys: Sequence[Key], split: Split, probes: Iterable[BatchProbe]
) -> tuple[dict[Key, float], dict[Key, float]]:
    """Mean KL and its standard error of each key, nats per token.

    Args:
        keys: (group, choice) pairs.
        split: the tokens of the probes, whose documents say which sequences belong together.
        probes: on some batches of the split, the same for every key.
    """
    by_key: dict[Key, list[BatchProbe]] = {key: [] for key in keys}
    for p in sorted(probes, key=lambda p: p.batch):
        if (p.group, p.choice) in by_key:
            by_key[p.group, p.choice].append(p)
    kl = {k: sum(p.kl_sum for p in ps) / sum(p.tokens for p in ps) for k, ps in by_key.items()}
    units = split.units
    return kl, {key: _standard_error(ps, units) for key, ps in by_key.items()}


def _bounded(kl: Mapping[Key, float]) -> dict[Key, float]:
    finite = {key: value for key, value in kl.items() if math.isfinite(value)}
    worst = 2.0 * sum(finite.values()) or 1.0
    return {key: finite.get(key, worst) for key in kl}


def _standard_error(probes: Sequence[BatchProbe], units: Sequence[Integers]) -> float:
    """Of the mean KL of one key over its batches, sequences weighted by their tokens."""
    sizes = [np.full(len(p.sequence_kl), p.tokens / len(p.sequence_kl)) for p in probes]
    sums = [np.array(p.sequence_kl) * size for p, size in zip(probes, sizes, strict=True)]
    unit = np.concatenate([units[p.batch] for p in probes])
    totals = UnitTotals.of(np.concatenate(sums), unit, np.concatenate(sizes))
    return totals.standard_error()


def keys_of(choices: Mapping[str, tuple[Choice, ...]]) -> Iterator[Key]:
    """Every (group, choice) of the open groups that a probe has to measure."""
    for group, legal in choices.items():
        if len(legal) > 1:
            yield from ((group, choice) for choice in legal if choice != BF16)
