"""How much a search does for its result: what a plain format stands for, and what follows."""

from enum import StrEnum

from autoquant.formats import GPTQ, NEAREST, PLAIN_RULES, ScaleRule

Way = tuple[str, str]
"""A scale rule and a rounding, which take the same bits."""


class Effort(StrEnum):
    """What a search tries at equal bits."""

    FAST = "fast"
    """Codes of the weight alone."""
    DEFAULT = "default"
    """Codes fitted to inputs too, which calibration has to collect second moments for."""

    @property
    def ways(self) -> tuple[Way, ...]:
        """Scale rules and roundings that a format without either stands for in a search space.

        Fitted codes fall back to plain ones linear by linear, so that two of them are enough: on
        the models of `experiments/codes` one of these two was the best for nine groups of ten.
        """
        plain = tuple((str(rule), NEAREST) for rule in PLAIN_RULES)
        if self is Effort.FAST:
            return plain
        return (*plain, (str(ScaleRule.MSE), GPTQ), (str(ScaleRule.HESSIAN), GPTQ))
