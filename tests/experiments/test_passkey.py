"""The passkey task: the number stands at its depth, and prompts are as long as they may be."""

import pytest

from experiments.long_context.passkey import DEPTHS, FILLER, items


def words(text):
    return len(text.split())


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_number_is_in_the_text_at_its_depth(depth):
    for item in items(depth, 5, 2000, words, 0):
        place = item["query"].index(item["answer"]) / len(item["query"])
        assert abs(place - depth / 100) < 0.1
        assert item["query"].count(item["answer"]) == 2
        assert 1900 < words(item["query"]) + 1 <= 2000


def test_the_same_seed_gives_the_same_items_and_another_gives_others():
    own, same, other = (list(items(50, 5, 500, words, seed)) for seed in (0, 0, 1))
    assert own == same
    assert own != other
    assert len({item["answer"] for item in own}) > 1


def test_a_short_context_holds_no_filler():
    (item,) = items(50, 1, 10, words, 0)
    assert FILLER not in item["query"]
