"""Errors that say what was given, which rule it broke, and what to do; each has an exit code."""

from functools import partial
from typing import Any, Self

LONGEST_LINE = 2000
"""Characters; more lose their middle."""


def first_line(error: BaseException) -> str:
    """First line of what an error of a library says, or its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def one_line(text: str) -> str:
    r"""`text` with line ends, control characters and lone surrogates written as `\n`, `\x1b`, ...

    Names of tensors and files come from strangers: they may be long and hold any character.
    """
    if len(text) > LONGEST_LINE:
        half = LONGEST_LINE // 2
        text = f"{text[:half]} [...] {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


class AutoQuantError(Exception):
    """Base of every error that is the user's to mend.

    Args:
        message: what was given, its value, the rule; becomes one line.
        fix: the way out; becomes one line.
    """

    exit_code = 1

    def __init__(self, message: str, *, fix: str) -> None:
        self.message = one_line(message)
        self.fix = one_line(fix)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} {self.fix}"

    def __reduce__(self) -> tuple[Any, ...]:
        """So that another process can raise it."""
        return partial(type(self), fix=self.fix), (self.message,)


class ConfigError(AutoQuantError):
    """A flag, a configuration file or a search space that cannot be meant as written."""

    exit_code = 2


class InfeasibleBudget(AutoQuantError):
    """Even the cheapest legal formats exceed the budget."""

    exit_code = 3


class SourceError(AutoQuantError):
    """A model, checkpoint or data set that is missing, unreadable or damaged."""

    exit_code = 4


class RunConflict(AutoQuantError):
    """The run directory belongs to another search, or to one that is still running."""

    exit_code = 5


class OutOfMemory(AutoQuantError):
    """The machine's or the device's memory does not hold what the command needs."""

    exit_code = 6


class RankLost(AutoQuantError):
    """Another process of a run that several measure together has ended."""

    exit_code = 130
    is_first = True
    """Whether no other process has noticed before, so that this one tells."""

    @classmethod
    def because(cls, reason: str) -> Self:
        """The error of a process that goes on no more.

        Args:
            reason: how it noticed, one line.
        """
        return cls(
            f"another process of this run has ended or cannot be reached: {reason}",
            fix="what ended it is said above, if it could say it; nothing is lost, and the same "
            "command goes on where it stopped.",
        )
