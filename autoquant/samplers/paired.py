"""The pruner that gives up who is clearly worse than the best on the same items."""

from collections.abc import Sequence

import numpy as np
from optuna import Study
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from autoquant.measure.race import RACE_DEVIATIONS, RACE_UNITS, Race, gap_of

RIVAL = "rival"
"""Attribute of a trial: the number of the trial that it races against, None where it races none."""


class PairedPruner(BasePruner):
    """Stops a trial whose mean is above its rival's by some standard errors of their difference.

    Step n of every trial reports the value of item n, less being better: for instance the KL of a
    document. Items are compared in pairs, so that hard ones are hard for both. The rival is the
    best whole trial within the constraints, or the one that the trial's attribute `rival` numbers.

    Args:
        unit: of each item, what is independent: items of one document resemble each other. Every
            item by default.
        weight: of each item in the mean, such as its tokens. All alike by default.
        deviations: standard errors of the difference beyond which a trial stops.
        fewest: units that must have been seen.
    """

    def __init__(
        self,
        unit: Sequence[int] | None = None,
        weight: Sequence[float] | None = None,
        *,
        deviations: float = RACE_DEVIATIONS,
        fewest: int = RACE_UNITS,
    ) -> None:
        self._unit, self._weight = unit, weight
        self._deviations, self._fewest = deviations, fewest

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial has lost its race on the steps that it reported."""
        race = self.race(study, trial)
        own = trial.intermediate_values
        steps = sorted(own)
        if race is None or not steps or steps[-1] >= len(race.rival):
            return False
        unit = np.array(steps if self._unit is None else [self._unit[step] for step in steps])
        weight = np.array([1.0 if self._weight is None else self._weight[step] for step in steps])
        means = np.array([own[step] for step in steps])
        rival = np.array([race.rival[step] for step in steps])
        gap = gap_of(means, rival, unit, weight)
        return len(np.unique(unit)) >= race.fewest and race.is_lost_by(gap)

    def race(self, study: Study, trial: FrozenTrial) -> Race | None:
        """The race of a trial, which may be run elsewhere; None of a trial without a rival."""
        if RIVAL in trial.user_attrs:
            number = trial.user_attrs[RIVAL]
            trials = study.get_trials(deepcopy=False)
            rival = None if number is None else trials[number]
        else:
            rival = _best(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        if rival is None or not rival.intermediate_values:
            return None
        values = rival.intermediate_values
        return Race(
            rival=tuple(values[step] for step in sorted(values)),
            deviations=self._deviations,
            fewest=self._fewest,
        )


def _best(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The whole trial of least value within the constraints, the earlier of equals."""
    able = [
        (t.value, t.number, t)
        for t in trials
        if t.value is not None
        and not t.user_attrs.get("is_stopped", False)
        and all(over <= 0 for over in t.constraints.values())
    ]
    return min(able, key=lambda each: each[:2], default=(None, None, None))[2]
