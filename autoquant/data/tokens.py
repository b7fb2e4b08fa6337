"""Token sequences and their three disjoint splits.

Nothing is padded: sequences of one batch have one length, so no statistic ever sees a padding
token. Shapes: B sequences, L tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import numpy as np
import torch

from autoquant.arrays import Integers
from autoquant.data.passages import SPLIT_SHARES, Row, Tokenizer, cut, deal, hash_of
from autoquant.data.text import Corpus
from autoquant.errors import SourceError

FEWEST_UNITS = 8
"""Documents, or passages, that a standard error or an interval needs to rest on."""


class Unit(StrEnum):
    """Stretches of text that count as independent of each other."""

    DOCUMENT = "document"
    PASSAGE = "passage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Token batches of one split, in a fixed order."""

    name: str
    batches: tuple[torch.Tensor, ...]
    """Each [B, L] int64, without padding."""
    documents: tuple[Integers, ...]
    """Number in the corpus of each sequence's document, [B] for each batch."""
    passages: tuple[Integers, ...]
    """Number in the corpus of each sequence's passage, [B] for each batch."""
    digest: str
    """First 16 hex digits of the SHA-256 over every sequence in order."""

    @classmethod
    def unrelated(cls, name: str, batches: Sequence[torch.Tensor], digest: str) -> Self:
        """Sequences that are each a document of their own, such as random tokens."""
        numbers = np.arange(sum(map(len, batches)), dtype=np.int64)
        own = tuple(np.split(numbers, np.cumsum([len(batch) for batch in batches])[:-1]))
        return cls(name=name, batches=tuple(batches), documents=own, passages=own, digest=digest)

    @property
    def tokens(self) -> int:
        return sum(batch.numel() for batch in self.batches)

    @property
    def sequences(self) -> int:
        return sum(len(batch) for batch in self.batches)

    @property
    def unit(self) -> Unit:
        """What standard errors and intervals take as independent.

        Documents, since sequences of one document resemble each other; its passages where there
        are fewer than `FEWEST_UNITS` documents.
        """
        documents, passages = _distinct(self.documents), _distinct(self.passages)
        is_enough = documents >= FEWEST_UNITS or documents == passages
        return Unit.DOCUMENT if is_enough else Unit.PASSAGE

    @property
    def units(self) -> tuple[Integers, ...]:
        """Number of each sequence's unit, [B] for each batch."""
        return self.documents if self.unit is Unit.DOCUMENT else self.passages

    @property
    def unit_count(self) -> int:
        """How many units there are."""
        return _distinct(self.units)

    def caution(self) -> str | None:
        """What to tell the user of errors and intervals on these tokens, or None."""
        if self.unit is Unit.DOCUMENT:
            return None
        return (
            f"the {self.name} tokens are from fewer than {FEWEST_UNITS} documents "
            f"({_distinct(self.documents)}): errors and intervals take their {self.unit_count} "
            "passages as independent, and are too narrow as far as passages of a document are "
            "alike. Text of more documents (a folder, or one JSONL record each) mends that."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPlan:
    """How many tokens each split may take, how they are cut, and which experts see them."""

    calibration: int = 8_192
    search: int = 16_384
    report: int = 65_536
    sequence_length: int = 256
    batch_tokens: int = 4_096
    seed: int = 0
    all_experts: bool = False
    """Whether calibration shows every token to every expert, not only to those routed to."""


def make_splits(corpus: Corpus, tokenizer: Tokenizer, plan: TokenPlan) -> dict[str, Split]:
    """Cut, hash and deal the corpus into `calibration`, `search` and `report`.

    A passage's side depends on its content alone; the seed only decides which passages of a side
    come first. So runs with different seeds, or with more text or less, never report on tokens that
    another one searched on, unless these are in a different passage there.

    Raises:
        SourceError: too little text to give each split one sequence.
    """
    sides = deal(cut(corpus, tokenizer, plan.sequence_length), plan.seed)
    splits = {}
    for name in SPLIT_SHARES:
        rows = _take(sides[name], getattr(plan, name))
        if not rows:
            raise SourceError(
                f"calibration text {corpus.name!r} leaves no sequence for the {name} split.",
                fix=f"pass more text: the three splits want {_wanted(plan)} tokens in all.",
            )
        splits[name] = batched(name, rows, plan.batch_tokens)
    return splits


def shortfalls(splits: dict[str, Split], plan: TokenPlan) -> list[str]:
    """One sentence for each split that got less than nine tenths of what the plan asks."""
    return [
        f"{name}: {split.tokens} tokens where {getattr(plan, name)} were asked"
        for name, split in splits.items()
        if split.tokens < 0.9 * getattr(plan, name)
    ]


def _wanted(plan: TokenPlan) -> int:
    return plan.calibration + plan.search + plan.report


def _take(rows: Iterator[Row], tokens: int) -> list[Row]:
    taken, count = [], 0
    for row in rows:
        if count >= tokens:
            break
        taken.append(row)
        count += len(row.tokens)
    return taken


def batched(name: str, rows: Sequence[Row], batch_tokens: int) -> Split:
    """Sequences of one length together, the longest first, `batch_tokens` or one row a batch."""
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        by_length.setdefault(len(row.tokens), []).append(row)
    batches = [
        batch
        for length in sorted(by_length, reverse=True)
        for batch in _batches(by_length[length], max(1, batch_tokens // length))
    ]
    return Split(
        name=name,
        batches=tuple(torch.tensor([row.tokens for row in batch]) for batch in batches),
        documents=tuple(np.array([row.document for row in batch]) for batch in batches),
        passages=tuple(np.array([row.passage for row in batch]) for batch in batches),
        digest=hash_of(row.tokens for row in rows).hex()[:16],
    )


def _batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _distinct(numbers: Iterable[Integers]) -> int:
    return len(np.unique(np.concatenate(tuple(numbers))))
