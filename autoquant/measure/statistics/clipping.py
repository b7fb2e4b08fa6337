"""Inputs that are larger than their static scales hold, counted on text that calibration never saw.

A few such elements cost little in mean KL; they are why a model writes on and on, or fails in long
contexts and on text unlike the calibration.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autoquant.plan.linears import LayerGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipped:
    """Input elements of the quantized products of one layer group."""

    group: str
    clipped: int
    elements: int


def clipped_by_group(
    groups: Iterable[LayerGroup], clipped: Mapping[str, tuple[int, int]]
) -> list[Clipped]:
    """A row for each group with quantized inputs, in the order of the forward pass.

    Args:
        groups: of the model.
        clipped: elements of each input set that were clipped, and all of them, as `TokenScores`
            has them.
    """
    rows = []
    for group in groups:
        sets = {*group.input_sets} & clipped.keys()
        if sets:
            beyond, elements = (sum(clipped[name][i] for name in sets) for i in (0, 1))
            rows.append(Clipped(group=group.name, clipped=beyond, elements=elements))
    return rows


def describe_clipped(rows: list[Clipped], headroom: float) -> dict[str, Any]:
    """As `result.json` holds it: totals, and the share of each group that clips anything."""
    return {
        "headroom": headroom,
        "clipped": sum(row.clipped for row in rows),
        "elements": sum(row.elements for row in rows),
        "groups": {row.group: row.clipped / row.elements for row in rows if row.clipped},
    }
