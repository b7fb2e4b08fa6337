"""Texts cut into passages of token sequences, and the side of the splits that each belongs to."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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

    def rows(self) -> Iterator[Row]:
        """Each sequence with its place."""
        for tokens in self.sequences:
            yield Row(tokens, self.document, self.number)


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
            yield Passage(document=index, number=number, sequences=stretch)
            number += 1


def _whole_steps(length: int) -> int:
    return length // LENGTH_STEP * LENGTH_STEP


def _sequence_prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The beginning-of-sequence token, where the tokenizer puts one before a text."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return (bos,) if bos is not None and len(ids) > 1 and ids[0] == bos else ()


def hash_of(sequences: Iterable[Sequence[int]], salt: str = "") -> bytes:
    """SHA-256 of token sequences."""
    digest = hashlib.sha256(salt.encode())
    for sequence in sequences:
        digest.update(torch.tensor(sequence, dtype=torch.int64).numpy().tobytes())
    return digest.digest()


def deal(passages: Iterable[Passage]) -> dict[str, list[Passage]]:
    """Put each distinct passage on its side."""
    sides: dict[str, list[Passage]] = {name: [] for name in SPLIT_SHARES}
    seen: set[tuple[int, ...]] = set()
    for passage in passages:
        fresh = tuple(s for s in passage.sequences if s not in seen)
        seen.update(fresh)
        if fresh:
            sides[_side(fresh)].append(replace(passage, sequences=fresh))
    return sides


def _side(passage: tuple[tuple[int, ...], ...]) -> str:
    position = int.from_bytes(hash_of(passage)[:8], "big") / 2**64
    for name, share in SPLIT_SHARES.items():
        position -= share
        if position < 0:
            return name
    return name
