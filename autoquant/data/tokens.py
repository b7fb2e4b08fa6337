"""Token sequences and their three disjoint splits.

Nothing is padded: sequences of one batch have one length, so no statistic ever sees a padding
token. Shapes: B sequences, L tokens.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from autoquant.data.text import Corpus
from autoquant.errors import SourceError

PASSAGE_SEQUENCES = 8
"""Consecutive sequences of a document that stay on one side of a split."""

LENGTH_STEP = 32
"""Tails of documents are cut to a multiple of this, so that few lengths exist to batch."""

SPLIT_SHARES = {"calibration": 0.10, "search": 0.30, "report": 0.60}


class Tokenizer(Protocol):
    """What this module needs of a Hugging Face tokenizer."""

    bos_token_id: int | None

    def __call__(self, text: str, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Token batches of one split, in a fixed order."""

    name: str
    batches: tuple[torch.Tensor, ...]
    """Each [B, L] int64, without padding."""
    digest: str
    """First 16 hex digits of the SHA-256 over every sequence in order."""

    @property
    def tokens(self) -> int:
        return sum(batch.numel() for batch in self.batches)

    @property
    def sequences(self) -> int:
        return sum(len(batch) for batch in self.batches)


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
    come first. So runs with different seeds never report on tokens that another one searched on.

    Raises:
        SourceError: too little text to give each split one sequence.
    """
    passages = _deal(_passages(corpus, tokenizer, plan.sequence_length))
    splits = {}
    for name in SPLIT_SHARES:
        wanted = getattr(plan, name)
        ordered = sorted(passages[name], key=lambda p: _hash(p, salt=str(plan.seed)))
        sequences = _take((s for p in ordered for s in p), wanted)
        if not sequences:
            raise SourceError(
                f"calibration text {corpus.name!r} leaves no sequence for the {name} split.",
                fix=f"pass more text: the three splits want {_wanted(plan)} tokens in all.",
            )
        splits[name] = _split(name, sequences, plan.batch_tokens)
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


def _passages(
    corpus: Corpus, tokenizer: Tokenizer, length: int
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yield passages: up to eight consecutive sequences of one document."""
    prefix = _sequence_prefix(tokenizer)
    body = length - len(prefix)
    for document in corpus.documents:
        text = document if isinstance(document, str) else document.render(tokenizer)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if prefix and tuple(ids[:1]) == prefix:  # the chat template has begun the text
            ids = ids[1:]
        sequences = []
        for start in range(0, len(ids), body):
            sequence = (*prefix, *ids[start : start + body])
            kept = len(sequence) if len(sequence) == length else _cut(len(sequence))
            if kept:
                sequences.append(sequence[:kept])
        for start in range(0, len(sequences), PASSAGE_SEQUENCES):
            yield tuple(sequences[start : start + PASSAGE_SEQUENCES])


def _cut(length: int) -> int:
    return length // LENGTH_STEP * LENGTH_STEP


def _sequence_prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The beginning-of-sequence token, where the tokenizer puts one before a text."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return (bos,) if bos is not None and len(ids) > 1 and ids[0] == bos else ()


def _hash(passage: Sequence[Sequence[int]], salt: str = "") -> bytes:
    digest = hashlib.sha256(salt.encode())
    for sequence in passage:
        digest.update(torch.tensor(sequence, dtype=torch.int64).numpy().tobytes())
    return digest.digest()


def _deal(
    passages: Iterable[tuple[tuple[int, ...], ...]],
) -> dict[str, list[tuple[tuple[int, ...], ...]]]:
    """Put each distinct passage on its side."""
    sides: dict[str, list[tuple[tuple[int, ...], ...]]] = {name: [] for name in SPLIT_SHARES}
    seen: set[tuple[int, ...]] = set()
    for passage in passages:
        fresh = tuple(s for s in passage if s not in seen)
        seen.update(fresh)
        if fresh:
            sides[_side(fresh)].append(fresh)
    return sides


def _side(passage: tuple[tuple[int, ...], ...]) -> str:
    position = int.from_bytes(_hash(passage)[:8], "big") / 2**64
    for name, share in SPLIT_SHARES.items():
        position -= share
        if position < 0:
            return name
    return name


def _take(sequences: Iterator[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
    taken, count = [], 0
    for sequence in sequences:
        if count >= tokens:
            break
        taken.append(sequence)
        count += len(sequence)
    return taken


def _split(name: str, sequences: list[tuple[int, ...]], batch_tokens: int) -> Split:
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence), []).append(sequence)
    batches = []
    for length in sorted(by_length, reverse=True):
        rows = torch.tensor(by_length[length], dtype=torch.int64)
        batches += rows.split(max(1, batch_tokens // length))
    return Split(name=name, batches=tuple(batches), digest=_hash(sequences).hex()[:16])
