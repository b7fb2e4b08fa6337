"""The three ways to find out what a group in a choice costs."""

from enum import StrEnum


class ProbeMethod(StrEnum):
    """How sensitivities come about, the most faithful first."""

    EXACT = "exact"
    """The KL of every (group, choice), measured."""
    SCREENED = "screened"
    """One choice of each group measured, which gradients name; the others scaled to it."""
    GRADIENT = "gradient"
    """Gradients alone: one forward and backward a batch for all groups."""
