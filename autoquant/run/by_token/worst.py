"""Which tokens an assignment changes most, in text, and how KL spreads over tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from autoquant.data.tokens import Split
from autoquant.measure.kl import TokenKl, TokenScores

EDGES = np.geomspace(1e-6, 10**1.5, 61)
"""Nats; eight bins a decade. The first bin holds all that is less, the last all that is more."""

Decode = Callable[[Sequence[int]], str]


def describe_tokens(
    winner: TokenScores,
    others: Mapping[str, TokenKl],
    split: Split,
    decode: Decode,
    *,
    count: int = 12,
    context: int = 48,
) -> dict[str, Any]:
    """The contents of `tokens.json`; KL in nats.

    Args:
        winner: scores of the chosen assignment on every token of `split`, in its order.
        others: scores of other assignments by name, for their histograms.
        split: the tokens.
        decode: token ids to text.
        count: how many tokens to show, worst first and at least `context` tokens apart.
        context: tokens shown before each.
    """
    histograms = [{"name": "the winner", "counts": _histogram(winner)}]
    histograms += [{"name": name, "counts": _histogram(kl)} for name, kl in others.items()]
    descending = np.sort(winner.kl)[::-1]
    total = max(float(descending.sum()), 1e-300)
    rows = [row for batch in split.batches for row in batch.tolist()]
    starts = np.cumsum([0] + [len(row) for row in rows])
    worst = []
    for index in _apart(winner, count, context):
        sequence = int(winner.sequence[index])
        at = index - int(starts[sequence])
        row = rows[sequence]
        worst.append(
            {
                "kl": float(winner.kl[index]),
                "sequence": sequence,
                "position": at,
                "before": decode(row[max(0, at + 1 - context) : at + 1]),
                "next": decode(row[at + 1 : at + 2]),
                "probability_bf16": _probability(winner.nll_reference[index]),
                "probability": _probability(winner.nll[index]),
            }
        )
    return {
        "split": {"name": split.name, "tokens": split.tokens, "digest": split.digest},
        "edges": EDGES.tolist(),
        "histograms": histograms,
        "worst_share": {
            share: float(descending[: max(1, int(len(descending) * fraction))].sum()) / total
            for share, fraction in (("1%", 0.01), ("10%", 0.1))
        },
        "worst": worst,
    }


def _histogram(scores: TokenKl) -> list[int]:
    clipped = np.clip(scores.kl, EDGES[0], EDGES[-1])
    return [int(n) for n in np.histogram(clipped, EDGES)[0]]


def _apart(scores: TokenKl, count: int, distance: int) -> Iterator[int]:
    """Indices of the largest KL, none within `distance` of a larger one of its sequence."""
    taken: list[int] = []
    for index in map(int, np.argsort(-scores.kl, kind="stable")):
        if len(taken) == count:
            return
        if all(
            scores.sequence[index] != scores.sequence[other] or abs(index - other) >= distance
            for other in taken
        ):
            taken.append(index)
            yield index


def _probability(nll: float) -> float | None:
    return None if np.isnan(nll) else float(np.exp(-nll))
