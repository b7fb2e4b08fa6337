"""KL by a token's position in its sequence: what a long context does to an assignment."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from autoquant.measure.kl import TokenKl
from autoquant.measure.uncertainty import UnitTotals

FIRST = 32
"""Positions of the first bucket; each further one is as long as all before it."""


def describe_positions(scores: Mapping[str, TokenKl]) -> list[dict[str, Any]]:
    """KL by position of each assignment, nats per token.

    Args:
        scores: of assignments on the same tokens, by name.

    Returns:
        Of each its name, its mean over sequences at every position from 0 on, and its buckets:
        `first` and `last` position, tokens, mean KL and its standard error over documents.
    """
    return [
        {"name": name, "mean": _means(own).tolist(), "buckets": list(_buckets(own))}
        for name, own in scores.items()
    ]


def _means(scores: TokenKl) -> Any:
    """Mean KL at each position, [L]; the longest sequences alone reach the last ones."""
    position = scores.position()
    return np.bincount(position, scores.kl) / np.bincount(position)


def _buckets(scores: TokenKl) -> Iterator[dict[str, Any]]:
    position = scores.position()
    unit, length = scores.unit[scores.sequence], int(position.max()) + 1
    first, end = 0, FIRST
    while first < length:
        inside = (position >= first) & (position < end)
        totals = UnitTotals.of(scores.kl[inside], unit[inside])
        yield {
            "first": first,
            "last": min(end, length) - 1,
            "tokens": int(inside.sum()),
            "kl": totals.mean,
            "stderr": totals.standard_error(),
        }
        first, end = end, 2 * end
