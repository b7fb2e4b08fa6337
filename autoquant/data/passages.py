"""Texts cut into passages of token sequences, and the side of the splits that each belongs to."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from autoquant.data.text import Corpus

PASSAGE_SEQUENCES = 8
"""Consecutive sequences of a document that stay on one side of a split."""

LENGTH_STEP = 32
"""Tails of documents are cut to a multiple of this, so that few lengths exist to batch."""

SPLIT_SHARES = {"calibration": 0.10, "search": 0.30, "report": 0.60}


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    bos_token_id: int | None

    def __call__(self, text: str, **kwargs: Any) -> Any: ...


class Row(NamedTuple):
    """One sequence, and where it is from."""

    tokens: tuple[int, ...]
    document: int
    passage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Up to eight consecutive sequences of one document."""

    document: int
    """Number in the corpus."""
    number: int
    """In the corpus."""
    sequences: tuple[tuple[int, ...], ...]
    content: bytes
    """SHA-256 of the sequences."""

    @property
    def side(self) -> str:
        """The split that the passage belongs to, by its content alone."""
        position = int.from_bytes(self.content[:8], "big") / 2**64
        for name, share in SPLIT_SHARES.items():
            position -= share
            if position < 0:
                return name
        return name

    def rank(self, seed: int) -> bytes:
        """By which the passages of a side are ordered: content and seed decide, not the corpus."""
        return hashlib.sha256(self.content + str(seed).encode()).digest()


def cut(corpus: Corpus, tokenizer: Tokenizer, length: int) -> Iterator[Passage]:
    """Yield the passages of a corpus, in sequences of `length` tokens and shorter tails."""
    prefix = _sequence_prefix(tokenizer)
    body = length - len(prefix)
    number = 0
    for index, document in enumerate(corpus.documents):
        text = document if isinstance(document, str) else document.render(tokenizer)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if prefix and tuple(ids[:1]) == prefix:  # the chat template has begun the text
            ids = ids[1:]
        sequences = []
        for start in range(0, len(ids), body):
            sequence = (*prefix, *ids[start : start + body])
            kept = len(sequence) if len(sequence) == length else _whole_steps(len(sequence))
            if kept:
                sequences.append(sequence[:kept])
        for start in range(0, len(sequences), PASSAGE_SEQUENCES):
            stretch = tuple(sequences[start : start + PASSAGE_SEQUENCES])
            yield Passage(
                document=index, number=number, sequences=stretch, content=hash_of(stretch)
            )
            number += 1


def _whole_steps(length: int) -> int:
    return length // LENGTH_STEP * LENGTH_STEP


def _sequence_prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The beginning-of-sequence token, where the tokenizer puts one before a text."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return (bos,) if bos is not None and len(ids) > 1 and ids[0] == bos else ()


def hash_of(sequences: Iterable[Sequence[int]]) -> bytes:
    """SHA-256 of token sequences and their lengths."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(torch.tensor(sequence, dtype=torch.int64).numpy().tobytes())
    return digest.digest()


def deal(passages: Iterable[Passage], seed: int) -> dict[str, Iterator[Row]]:
    """The sequences of each side, in the order in which a split takes them, each one once.

    What is in passages of two sides is in none, so no text that is added or taken away moves a
    sequence from one side to another.
    """
    sides: dict[str, dict[bytes, Passage]] = {name: {} for name in SPLIT_SHARES}
    side_of: dict[tuple[int, ...], str | None] = {}
    for passage in passages:
        sides[passage.side].setdefault(passage.content, passage)
        for sequence in passage.sequences:
            if side_of.setdefault(sequence, passage.side) != passage.side:
                side_of[sequence] = None
    return {
        name: _rows(sorted(found.values(), key=lambda p: p.rank(seed)), side_of)
        for name, found in sides.items()
    }


def _rows(
    passages: Iterable[Passage], side_of: Mapping[tuple[int, ...], str | None]
) -> Iterator[Row]:
    taken: set[tuple[int, ...]] = set()
    for passage in passages:
        for tokens in passage.sequences:
            if side_of[tokens] is not None and tokens not in taken:
                taken.add(tokens)
                yield Row(tokens, passage.document, passage.number)
