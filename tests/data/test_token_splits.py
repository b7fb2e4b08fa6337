"""Token splits: disjoint, unpadded, the same for everyone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from searchable import save_text, save_tokenizer
from transformers import AutoTokenizer

from autoquant.data.text import Corpus, load_corpus
from autoquant.data.tokens import Split, TokenPlan, make_splits, shortfalls
from autoquant.errors import SourceError

PLAN = TokenPlan(calibration=512, search=1024, report=2048, sequence_length=64, batch_tokens=256)

DIGESTS = {
    "calibration": "053b58ecf69e6b60",
    "search": "d781c2e23e25f9b0",
    "report": "74f3934338cf8ace",
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


def test_no_sequence_is_on_two_sides_or_twice_on_one(corpus):
    found = [s for split in make_splits(corpus, Letters(), PLAN).values() for s in sequences(split)]
    assert len(found) == len(set(found))


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


@given(
    documents=st.lists(st.text("abc", min_size=1, max_size=400), min_size=40, max_size=60),
    length=st.integers(32, 80),
    seed=st.integers(0, 3),
)
def test_every_sequence_is_a_stretch_of_one_document(documents, length, seed):
    corpus = Corpus(name="letters", documents=tuple(documents))
    plan = TokenPlan(
        calibration=64, search=64, report=64, sequence_length=length, batch_tokens=128, seed=seed
    )
    try:
        splits = make_splits(corpus, Letters(), plan)
    except SourceError:
        return
    for split in splits.values():
        for sequence in sequences(split):
            assert any("".join(map(chr, sequence)) in document for document in documents)


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
