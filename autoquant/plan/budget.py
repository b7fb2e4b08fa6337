"""What a user allows: bits per element, and of which tensors."""

from dataclasses import dataclass
from enum import StrEnum

from autoquant.decimals import shortest
from autoquant.errors import ConfigError
from autoquant.formats import all_formats

MOST_BPE = 64
"""Bits of an element of the widest type that a checkpoint may hold."""


class Scope(StrEnum):
    """What a cost counts."""

    CHECKPOINT = "checkpoint"
    """Every tensor of the checkpoint."""
    SEARCHED = "searched"
    """The layer groups that the search space leaves open."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The most bits per element that an assignment may take.

    Raises:
        ConfigError: not a positive number, or more than any tensor takes.
    """

    bpe: float
    scope: Scope = Scope.CHECKPOINT

    def __post_init__(self) -> None:
        if not 0 < self.bpe <= MOST_BPE:
            raise ConfigError(
                f"a budget of {shortest(self.bpe)} bits per element is not between 0 and "
                f"{MOST_BPE}.",
                fix=f"{_bits_of_formats()}.",
            )


def _bits_of_formats() -> str:
    bits = (f"{format.label} takes {float(format.weight_bits):g}" for format in all_formats())
    return ", ".join(bits) + " bits per element"
