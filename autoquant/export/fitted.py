"""Linears of a checkpoint with codes fitted to inputs: how it names them, what must hold of them.

Compensated codes are not the nearest to the source. What must hold of all fitted codes is that they
do no more harm to the product with the inputs that they were fitted to than codes of the weight
alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from autoquant.codes.book import CodeBook
from autoquant.codes.statistics import StatisticsStore
from autoquant.codes.weights import Unit
from autoquant.errors import AutoQuantError, SourceError
from autoquant.formats import CODES, GLOBAL_SCALE, SCALE, Choice
from autoquant.formats.fitted import plain_codes
from autoquant.formats.packed import Packed
from autoquant.formats.rounded import Rounded
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import Groups
from autoquant.plan.linears import LayerGroup, Linear

_SLACK = 1 + 2.0**-10
"""Room for sums in another order."""


def fitted_linears(groups: Groups, assignment: Assignment, book: CodeBook) -> dict[str, list[str]]:
    """The linears with fitted codes by their choice, as a checkpoint names them."""
    found: dict[str, list[str]] = {}
    for group in groups:
        choice = assignment[group.name].of_weight
        if choice.format.needs_moments(choice):
            plain = book.plain(group, choice)
            names = [linear.name for linear in group.linears if linear.name not in plain]
            found.setdefault(str(choice), []).extend(names)
    return {choice: names for choice, names in found.items() if names}


def read_fitted(said: object) -> dict[str, Choice]:
    """The choice of every linear that `fitted_linears` named; none of anything else."""
    if not isinstance(said, dict):
        return {}
    found: dict[str, Choice] = {}
    for text, names in said.items():
        try:
            choice = Choice.parse(text)
        except AutoQuantError:
            continue
        if isinstance(names, list) and choice.format.needs_moments(choice):
            found |= dict.fromkeys(map(str, names), choice)
    return found


@dataclass(slots=True)
class HarmCheck:
    """Holds fitted codes against those of the weight alone.

    Args:
        statistics: of the run that made the checkpoint.
        linears: of the checkpoint.
    """

    statistics: StatisticsStore
    linears: Mapping[str, tuple[LayerGroup, Linear]]
    """By name, each with its group."""
    compared: int = 0
    """Linears whose statistics were there."""

    def problem(self, weight: Tensor, packed: Packed, choice: Choice, name: str) -> str | None:
        """What is wrong with the codes of a linear [N, K], or None."""
        group, linear = self.linears[name]
        try:
            moments = self.statistics.moments(
                Unit(name=name, layer=group.layer, matrices=((linear,),))
            )
        except SourceError:
            return None
        assert choice.scale_rule is not None
        scale = packed.parts[GLOBAL_SCALE].view(1)
        plain = plain_codes(weight[None], scale, choice.scale_rule)
        stored = Rounded(packed.parts[CODES][None], packed.parts[SCALE][None])
        ours, theirs = (
            own.harm(weight[None], scale, moments.mean(), [len(weight)]).item()
            for own in (stored, plain)
        )
        self.compared += 1
        if ours <= theirs * _SLACK:
            return None
        return (
            f"{name}: its codes do {ours / theirs:.3f} times the harm of the nearest ones to the "
            "inputs that they were fitted to."
        )
