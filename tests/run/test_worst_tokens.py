"""Tokens that an assignment changes most."""

import numpy as np
import pytest
import torch

from autoquant.data.tokens import Split
from autoquant.measure.kl import TokenScores
from autoquant.run.by_token.worst import EDGES, describe_tokens

ROWS, LENGTH = 3, 40


@pytest.fixture
def split() -> Split:
    tokens = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)
    return Split.unrelated("report", (tokens[:2], tokens[2:]), digest="d" * 16)


def scores_of(kl: np.ndarray) -> TokenScores:
    nll = np.full(kl.shape, np.log(2.0))
    nll[LENGTH - 1 :: LENGTH] = np.nan
    return TokenScores(
        kl=kl,
        sequence=np.repeat(np.arange(ROWS), LENGTH),
        unit=np.arange(ROWS),
        agrees=np.ones(kl.shape, dtype=bool),
        nll_reference=nll,
        nll=2 * nll,
    )


def decode(ids) -> str:
    return " ".join(map(str, ids))


def test_the_worst_tokens_come_first_each_with_what_was_before_it(split):
    kl = np.full(ROWS * LENGTH, 0.01)
    kl[50], kl[90] = 3.0, 5.0  # sequence 1 position 10, sequence 2 position 10
    first, second = describe_tokens(scores_of(kl), {}, split, decode, count=2, context=4)["worst"]
    assert (first["sequence"], first["position"], first["kl"]) == (2, 10, 5.0)
    assert first["before"] == "87 88 89 90"
    assert first["next"] == "91"
    assert first["probability_bf16"] == pytest.approx(0.5)
    assert first["probability"] == pytest.approx(0.25)
    assert (second["sequence"], second["position"]) == (1, 10)


def test_neighbours_of_a_bad_token_are_not_shown_again(split):
    kl = np.full(ROWS * LENGTH, 0.01)
    kl[10:14] = [4.0, 3.9, 3.8, 3.7]
    worst = describe_tokens(scores_of(kl), {}, split, decode, count=3, context=8)["worst"]
    for one in worst:
        for other in worst:
            if one is not other and one["sequence"] == other["sequence"]:
                assert abs(one["position"] - other["position"]) >= 8


def test_the_last_token_of_a_sequence_has_no_next(split):
    kl = np.full(ROWS * LENGTH, 0.01)
    kl[LENGTH - 1] = 2.0
    (worst,) = describe_tokens(scores_of(kl), {}, split, decode, count=1)["worst"]
    assert worst["next"] == ""
    assert worst["probability_bf16"] is None


def test_histograms_hold_every_token_and_shares_every_nat(split):
    kl = np.geomspace(1e-12, 1e3, ROWS * LENGTH)
    described = describe_tokens(scores_of(kl), {"other": scores_of(kl * 0)}, split, decode)
    winner, other = described["histograms"]
    assert sum(winner["counts"]) == sum(other["counts"]) == ROWS * LENGTH
    assert len(winner["counts"]) + 1 == len(described["edges"]) == len(EDGES)
    assert other["counts"][0] == ROWS * LENGTH
    assert described["worst_share"]["1%"] == pytest.approx(kl[-1] / kl.sum())
    assert described["worst_share"]["1%"] <= described["worst_share"]["10%"] <= 1.0
