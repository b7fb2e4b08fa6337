"""Errors that say what was given, which rule it broke, and what to do; each has an exit code."""


class AutoQuantError(Exception):
    """Base of every error that is the user's to mend.

    Args:
        message: one line: what was given, its value, the rule.
        fix: one line: the way out.
    """

    exit_code = 1

    def __init__(self, message: str, *, fix: str) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} {self.fix}"


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
