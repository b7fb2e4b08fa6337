"""Inputs that are larger than their static scales hold, counted on text that calibration never saw.

A few such elements cost little in mean KL; they are why a model writes on and on, or fails in long
contexts and on text unlike the calibration.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant.data.tokens import Split
from autoquant.measure.ranks.together import together
from autoquant.measure.scorer import Scorer
from autoquant.plan.assignment import Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipped:
    """Input elements of the quantized products of one layer group."""

    group: str
    clipped: int
    elements: int


def count_clipped(
    scorer: Scorer, split: Split, assignment: Assignment, advance: Callable[[], None]
) -> list[Clipped]:
    """Count what a whole assignment clips of its inputs on every token of the split.

    Args:
        scorer: calibrated.
        split: tokens that are not those of the calibration.
        assignment: group to choice.
        advance: called after each batch.

    Returns:
        A row for each group with quantized inputs, in the order of the forward pass.
    """
    found: dict[str, tuple[int, int]] = {}
    for wave in scorer.waves(split, range(len(split.batches)), forwards=1):
        for own in _clipped(scorer, split, wave, assignment):
            for name, (clipped, elements) in own.items():
                before = found.get(name, (0, 0))
                found[name] = before[0] + clipped, before[1] + elements
        for _ in wave:
            advance()
    rows = []
    for group in scorer.quantized.groups:
        sets = {linear.input_scale_set for linear in group.linears} & found.keys()
        if sets:
            clipped, elements = (sum(found[name][i] for name in sets) for i in (0, 1))
            rows.append(Clipped(group=group.name, clipped=clipped, elements=elements))
    return rows


@together
def _clipped(
    scorer: Scorer, split: Split, batches: Sequence[int], assignment: Assignment
) -> list[dict[str, tuple[int, int]]]:
    """Of each rank's batches: input elements of each set that were clipped, and all of them."""

    def counted() -> dict[str, tuple[int, int]]:
        with scorer.quantized.counting():
            own = [split.batches[index] for index in scorer.ranks.dealt(batches)]
            scorer.forward(own, assignment)
            return scorer.quantized.clipped()

    return scorer.ranks.all_of(counted)


def describe_clipped(rows: list[Clipped], headroom: float) -> dict[str, Any]:
    """As `result.json` holds it: totals, and the share of each group that clips anything."""
    return {
        "headroom": headroom,
        "clipped": sum(row.clipped for row in rows),
        "elements": sum(row.elements for row in rows),
        "groups": {row.group: row.clipped / row.elements for row in rows if row.clipped},
    }
