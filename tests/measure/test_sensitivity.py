"""What batch probes say of the KL of a (group, choice), and how sure it is."""

import math

import numpy as np
import pytest
import torch

from autoquant.data.tokens import Split
from autoquant.formats import BF16, FP8, NVFP4, Choice
from autoquant.measure.sensitivity import BatchProbe, keys_of, summarize

KEY = ("a", Choice.parse("fp8"))
SPLIT = Split(
    name="search",
    batches=(torch.zeros(3, 64, dtype=torch.int64), torch.zeros(2, 32, dtype=torch.int64)),
    documents=(np.array([5, 5, 9]), np.array([9, 2])),
    passages=(np.array([5, 6, 9]), np.array([10, 2])),
    digest="0",
)


def probe_of(batch: int, *sequence_kl: float) -> BatchProbe:
    length = SPLIT.batches[batch].shape[1]
    return BatchProbe(
        batch=batch,
        group=KEY[0],
        choice=KEY[1],
        kl_sum=length * sum(sequence_kl),
        tokens=length * len(sequence_kl),
        sequence_kl=sequence_kl,
    )


def left_out(sums: dict[int, float], tokens: dict[int, int]) -> float:
    """The standard error of a mean by leaving out its units one by one."""
    mean = sum(sums.values()) / sum(tokens.values())
    moved = [
        sum(v for k, v in sums.items() if k != unit)
        / sum(v for k, v in tokens.items() if k != unit)
        for unit in sums
    ]
    return math.sqrt(sum((m - mean) ** 2 for m in moved) * (len(sums) - 1) / len(sums))


def test_long_sequences_weigh_more_and_units_are_left_out_whole():
    """Fewer than eight documents: passages are the units."""
    kl, stderr = summarize([KEY], SPLIT, [probe_of(1, 4.0, 5.0), probe_of(0, 1.0, 2.0, 3.0)])
    assert kl[KEY] == pytest.approx((64 * 6 + 32 * 9) / 256)
    sums = {5: 64.0, 6: 128.0, 9: 192.0, 10: 128.0, 2: 160.0}
    assert stderr[KEY] == pytest.approx(left_out(sums, {5: 64, 6: 64, 9: 64, 10: 32, 2: 32}))


def test_documents_are_the_units_where_there_are_eight():
    rows = torch.zeros(9, 32, dtype=torch.int64)
    number = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7])
    split = Split(
        name="search", batches=(rows,), documents=(number,), passages=(np.arange(9),), digest="0"
    )
    kl = np.random.default_rng(0).normal(1.0, 0.1, 9)
    probe = BatchProbe(
        batch=0,
        group=KEY[0],
        choice=KEY[1],
        kl_sum=32 * kl.sum(),
        tokens=288,
        sequence_kl=tuple(kl),
    )
    sums = {unit: 32 * kl[number == unit].sum() for unit in range(8)}
    tokens = {unit: 32 * int((number == unit).sum()) for unit in range(8)}
    assert summarize([KEY], split, [probe])[1][KEY] == pytest.approx(left_out(sums, tokens))


def test_a_batch_of_one_document_has_no_standard_error():
    whole = Split(
        name="search",
        batches=(torch.zeros(3, 64, dtype=torch.int64),) * 8,
        documents=tuple(np.full(3, number) for number in range(8)),
        passages=tuple(np.full(3, number) for number in range(8)),
        digest="0",
    )
    assert math.isnan(summarize([KEY], whole, [probe_of(0, 1.0, 2.0, 3.0)])[1][KEY])


def test_a_group_with_one_choice_is_not_probed():
    choices = {"closed": (BF16,), "kept": (FP8,), "open": (NVFP4, FP8, BF16), "two": (FP8, BF16)}
    assert [*keys_of(choices)] == [("open", NVFP4), ("open", FP8), ("two", FP8)]
