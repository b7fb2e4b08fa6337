"""What a search knows of whole candidates: its own trials, in order, and those of others."""

from collections.abc import Iterable

from autoquant.plan.assignment import Assignment
from autoquant.search.trials import Trial


class History:
    """The trials of a search, each assignment once; data alone, which measures nothing.

    A trial of another budget's search becomes a trial of this one when its assignment is proposed
    again.

    Args:
        trials: what this search has measured, in an earlier process.
        elsewhere: what searches of other budgets measured to the end on the same tokens.
    """

    def __init__(self, trials: Iterable[Trial] = (), elsewhere: Iterable[Trial] = ()) -> None:
        self._own = {trial.assignment.digest: trial for trial in trials}
        self._elsewhere = {trial.assignment.digest: trial for trial in elsewhere}

    def __contains__(self, assignment: Assignment) -> bool:
        return assignment.digest in self._own

    def __getitem__(self, assignment: Assignment) -> Trial:
        return self._own[assignment.digest]

    @property
    def trials(self) -> tuple[Trial, ...]:
        """In the order in which they were proposed."""
        return tuple(self._own.values())

    @property
    def tokens(self) -> int:
        """Tokens of all trials together."""
        return sum(trial.tokens for trial in self._own.values())

    def eligible(self) -> list[Trial]:
        """The trials that may win."""
        return [trial for trial in self._own.values() if trial.is_eligible]

    def best(self) -> Trial | None:
        """The eligible trial of least KL, the earlier of equals; None without any."""
        return min(self.eligible(), key=lambda trial: trial.order, default=None)

    def elsewhere(self, assignment: Assignment) -> Trial | None:
        """The trial that another budget's search made of `assignment`."""
        return self._elsewhere.get(assignment.digest)

    def add(self, trial: Trial) -> None:
        """Append a trial.

        Raises:
            ValueError: its assignment has one.
        """
        if trial.assignment in self:
            raise ValueError(f"trial {trial.number} repeats {self[trial.assignment].number}")
        self._own[trial.assignment.digest] = trial
