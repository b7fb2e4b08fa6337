"""Token splits: disjoint, unpadded, the same for everyone."""

import random
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchable import save_text, save_tokenizer
from transformers import AutoTokenizer

from autoquant.data.passages import hash_of
from autoquant.data.text import Corpus, load_corpus
from autoquant.data.tokens import Split, TokenPlan, Unit, make_splits, shortfalls
from autoquant.errors import SourceError

PLAN = TokenPlan(calibration=512, search=1024, report=2048, sequence_length=64, batch_tokens=256)

DIGESTS = {
    "calibration": "d6f91076bf7c0256",
    "search": "7dc57a39d8d25d83",
    "report": "09f794ba5689e831",
}


class Letters:
    """A tokenizer of single characters, none of which is token 0."""

    bos_token_id: int | None = None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(save_text(tmp_path_factory.mktemp("text") / "text", documents=60)))


def sequences(split: Split) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in split.batches for row in batch]


def everything(corpus: Corpus, seed: int) -> dict[str, frozenset[tuple[int, ...]]]:
    """Members of each side when a split takes all there is."""
    plan = TokenPlan(calibration=10**9, search=10**9, report=10**9, sequence_length=64, seed=seed)
    splits = make_splits(corpus, Letters(), plan)
    return {name: frozenset(sequences(split)) for name, split in splits.items()}


def repetitive(seed: int = 0, *, documents: int = 60) -> Corpus:
    """Documents whose lines recur, half of them under a header that they share."""
    generator = random.Random(seed)
    lines = ["".join(generator.choices(ascii_letters, k=32)) for _ in range(3000)]
    header = "".join(lines[:6])
    texts = (
        header * generator.randint(0, 1) + "".join(generator.choices(lines, k=40))
        for _ in range(documents)
    )
    return Corpus(name="repetitive", documents=tuple(texts))


def test_no_sequence_is_on_two_sides_or_twice_on_one():
    plan = TokenPlan(calibration=10**9, search=10**9, report=10**9, sequence_length=32)
    corpus = repetitive()
    splits = make_splits(corpus, Letters(), plan)
    found = [sequence for split in splits.values() for sequence in sequences(split)]
    stored = [text[i : i + 32] for text in corpus.documents for i in range(0, len(text), 32)]
    assert len(found) == len(set(found)) < len(set(stored)) < len(stored)


@pytest.mark.parametrize("seed", range(4))
def test_text_in_front_moves_no_sequence_to_another_side(seed):
    corpus, front = repetitive(seed), repetitive(seed, documents=70).documents[60:]
    before = everything(corpus, 0)
    after = everything(Corpus(name="more", documents=front + corpus.documents), 0)
    assert all(sum(map(len, sides.values())) > 30 for sides in (before, after))
    for name in before:
        for other in after.keys() - {name}:
            assert not before[name] & after[other]


def test_splits_do_not_depend_on_the_order_of_the_documents():
    corpus = repetitive()
    order = random.Random(1).sample(range(60), 60)
    shuffled = Corpus(name="shuffled", documents=tuple(corpus.documents[n] for n in order))
    one, other = (make_splits(c, Letters(), PLAN) for c in (corpus, shuffled))
    assert {n: s.digest for n, s in one.items()} == {n: s.digest for n, s in other.items()}
    for split in other.values():
        numbers = np.concatenate(split.documents).tolist()
        for sequence, number in zip(sequences(split), numbers, strict=True):
            assert "".join(map(chr, sequence)) in shuffled.documents[number]


def test_hashes_know_where_a_sequence_ends():
    assert hash_of([[1], [2, 3]]) != hash_of([[1, 2], [3]])
    assert hash_of([[1], []]) != hash_of([[1]])


def test_sides_do_not_depend_on_the_seed_but_their_order_does(corpus):
    assert everything(corpus, 0) == everything(corpus, 1)
    first, other = (
        make_splits(corpus, Letters(), TokenPlan(report=512, seed=seed)) for seed in (0, 1)
    )
    assert first["report"].digest != other["report"].digest


def test_repeated_text_stays_on_one_side(corpus):
    repeated = Corpus(name="twice", documents=corpus.documents * 2)
    assert everything(repeated, 0) == everything(corpus, 0)


def test_splits_take_what_was_asked_and_little_more(corpus):
    for name, split in make_splits(corpus, Letters(), PLAN).items():
        assert getattr(PLAN, name) <= split.tokens < getattr(PLAN, name) + PLAN.sequence_length
        assert split.tokens == sum(map(len, sequences(split)))
        assert split.sequences == len(sequences(split))


def test_batches_keep_to_their_size_and_are_never_padded(corpus):
    for split in make_splits(corpus, Letters(), PLAN).values():
        for batch in split.batches:
            assert batch.dtype == torch.int64
            assert batch.numel() <= PLAN.batch_tokens
            assert batch.shape[1] == PLAN.sequence_length or batch.shape[1] % 32 == 0
            assert (batch > 0).all()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    longest=st.integers(200, 2000),
    length=st.integers(32, 80),
    order=st.integers(0, 3),
)
def test_every_sequence_is_a_stretch_of_the_document_that_it_names(seed, longest, length, order):
    generator = random.Random(seed)
    documents = tuple(
        "".join(generator.choices(ascii_letters, k=generator.randint(1, longest)))
        for _ in range(250)
    )
    plan = TokenPlan(
        calibration=64,
        search=640,
        report=1280,
        sequence_length=length,
        batch_tokens=128,
        seed=order,
    )
    splits = make_splits(Corpus(name="letters", documents=documents), Letters(), plan)
    for split in splits.values():
        numbers = np.concatenate(split.documents).tolist()
        for sequence, number in zip(sequences(split), numbers, strict=True):
            assert "".join(map(chr, sequence)) in documents[number]


def test_a_passage_is_eight_sequences_of_one_document_in_a_row():
    """Token n of document d is 1000 d + n, and every split takes all there is."""

    class Numbers(Letters):
        def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
            begin, count = (0, 1) if text == "a" else map(int, text.split())
            return {"input_ids": list(range(begin, begin + count))}

    texts = tuple(f"{1000 * (d + 1)} {320 + 32 * d}" for d in range(20))
    plan = TokenPlan(calibration=10**6, search=10**6, report=10**6, sequence_length=32)
    splits = make_splits(Corpus(name="numbers", documents=texts), Numbers(), plan)
    passage_of: dict[tuple[int, int], int] = {}
    for split in splits.values():
        places = zip(*map(np.concatenate, (split.documents, split.passages)), strict=True)
        for sequence, (document, passage) in zip(sequences(split), places, strict=True):
            assert sequence[0] // 1000 == document + 1
            stretch = document, sequence[0] % 1000 // (8 * 32)
            assert passage_of.setdefault(stretch, passage) == passage
    assert sum(split.sequences for split in splits.values()) == sum(10 + d for d in range(20))
    numbers = list(passage_of.values())
    assert len(numbers) == len(set(numbers)) == sum(-(-(10 + d) // 8) for d in range(20))


def split_from(documents: Sequence[int], passages: Sequence[int]) -> Split:
    """Two batches of sequences from these places."""
    cut = len(documents) // 2
    return Split(
        name="report",
        batches=(torch.zeros(cut, 32), torch.zeros(len(documents) - cut, 32)),
        documents=(np.array(documents[:cut]), np.array(documents[cut:])),
        passages=(np.array(passages[:cut]), np.array(passages[cut:])),
        digest="0",
    )


def test_documents_are_what_is_independent_from_eight_on():
    eight, seven = (split_from(np.arange(18) % n, np.arange(18) // 2) for n in (8, 7))
    assert (eight.unit, eight.unit_count, eight.caution()) == (Unit.DOCUMENT, 8, None)
    assert [list(part) for part in eight.units] == [list(part) for part in eight.documents]
    assert (seven.unit, seven.unit_count) == (Unit.PASSAGE, 9)
    assert [list(part) for part in seven.units] == [list(part) for part in seven.passages]
    assert "the report tokens are from fewer than 8 documents (7)" in str(seven.caution())
    assert "their 9 passages as independent" in str(seven.caution())


def test_few_documents_of_one_passage_each_are_documents():
    few = split_from([4, 4, 6, 9], [10, 10, 20, 30])
    assert (few.unit, few.unit_count, few.caution()) == (Unit.DOCUMENT, 3, None)


def test_unrelated_sequences_are_documents_of_their_own():
    split = Split.unrelated("search", (torch.zeros(3, 8), torch.zeros(2, 4)), digest="0")
    assert [list(part) for part in split.documents] == [[0, 1, 2], [3, 4]]
    assert (split.unit, split.unit_count) == (Unit.DOCUMENT, 5)


def test_digests_are_the_same_on_every_machine():
    corpus = Corpus(name="numbers", documents=tuple(str(n) * 40 for n in range(1000, 1200)))
    splits = make_splits(corpus, Letters(), PLAN)
    assert {name: split.digest for name, split in splits.items()} == DIGESTS


def test_too_little_text_is_refused():
    with pytest.raises(SourceError, match="leaves no sequence for the calibration split"):
        make_splits(Corpus(name="short", documents=("too short",)), Letters(), PLAN)


def test_less_text_than_asked_is_said(corpus):
    plan = TokenPlan(calibration=64, search=64, report=10**9, sequence_length=64)
    splits = make_splits(corpus, Letters(), plan)
    assert shortfalls(splits, plan) == [
        f"report: {splits['report'].tokens} tokens where 1000000000 were asked"
    ]


@pytest.mark.parametrize("bos", [False, True])
def test_sequences_begin_as_the_tokenizer_begins_a_text(corpus, tmp_path, bos):
    save_tokenizer(tmp_path, bos=bos)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    splits = make_splits(corpus, tokenizer, PLAN)
    found: Sequence[tuple[int, ...]] = [s for split in splits.values() for s in sequences(split)]
    assert all((sequence[0] == 1) is bos for sequence in found)
    assert not any(1 in sequence[1:] for sequence in found)
    assert any(len(sequence) == PLAN.sequence_length for sequence in found)
