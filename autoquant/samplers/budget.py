"""The sampler that proposes what a surrogate of the measured assignments holds for best."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Self

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from autoquant.errors import ConfigError
from autoquant.plan.assignment import Assignment
from autoquant.samplers.schedule import Made, Proposed, Schedule
from autoquant.samplers.table import OptionTable, Space
from autoquant.search.predictor import Options, Predictor
from autoquant.search.propose.shares import Effort, shared_out
from autoquant.search.trials import Stage, Trial

GIVEN = frozenset({Stage.BASELINE, Stage.SOLVER, Stage.RULES})
"""Attribute `stage` of trials that were enqueued; of those that say nothing Optuna knows it."""


class BudgetSampler(BaseSampler):
    """Proposes assignments of options to groups that keep a budget and promise the least objective.

    First those of least predicted objective by a surrogate that is fitted to the trials so far,
    then those of a surrogate that is fitted again every five trials, then neighbours of the best
    that change one group or two. A knapsack makes each one keep and fill the budget; none is
    proposed twice. `docs/search.md` has the formulas.

    The objective is positive and less is better; without groups that cost more in company it is
    about the sum of what options do alone. Trials that were enqueued teach the surrogate, whether
    they keep the budget or not. The sampler reads the study and writes nothing, so a study that is
    loaded again goes on with the same proposals.

    Args:
        choices: labels of each group's options; the parameters of the study.
        costs: an integer of each option, such as bytes.
        budget: the most that the options of all groups may cost together.
        prior: what each option does to the objective alone, in its unit, not negative.
        trials: how many will be asked for; half of them follow the first fit.
        together: trials that are asked for before any of them is told.

    Raises:
        ConfigError: costs or prior do not match the choices.
        InfeasibleBudget: at the first trial: the cheapest options cost more than the budget.
    """

    def __init__(
        self,
        choices: Mapping[str, Sequence[Any]],
        costs: Mapping[str, Sequence[int]],
        *,
        budget: int,
        prior: Mapping[str, Sequence[float]],
        trials: int = 30,
        together: int = 1,
    ) -> None:
        table = OptionTable.of(choices, costs, budget, prior)
        predictor = Predictor(table, table.surrogate)
        effort = Effort.of(trials)
        self._become(table, table, lambda: Schedule(shared_out(predictor, effort), together))

    @classmethod
    def by(cls, options: Options, space: Space, made: Made) -> Self:
        """A sampler over other options, or with other proposers.

        Args:
            options: under a budget; the space may have more, which are closed.
            space: of the study.
            made: makes its schedule.
        """
        sampler = cls.__new__(cls)
        sampler._become(options, space, made)
        return sampler

    def _become(self, options: Options, space: Space, made: Made) -> None:
        self._options, self._space, self._made = options, space, made
        self._read: list[tuple[int, datetime | None]] = []
        """The trials that the schedule has been through; it is made anew for others."""
        self._schedule = made()

    def pending(self, study: Study) -> Sequence[Proposed]:
        """What the next asks will be answered with before another trial is finished.

        Empty where nothing is left that keeps the budget and is new.
        """
        return self._ahead(study.get_trials(deepcopy=False))

    def coming(self, study: Study) -> Sequence[Assignment]:
        """What the rounds after the pending one will ask for if its trials change nothing, as far
        as that is known: for who measures more at a time than is asked for.
        """
        self._follow(study.get_trials(deepcopy=False))
        return self._schedule.coming()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The same for every trial of the study."""
        return self._space.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of one assignment; none for a trial that was enqueued.

        Raises:
            ConfigError: nothing is left to propose, or more trials run than were to be asked for at
                a time.
        """
        if _is_given(trial):
            return {}
        others = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        ahead = self._ahead(others)
        if not ahead:
            raise _nothing_ahead(len(self._schedule.pending()))
        return self._space.params(ahead[0].proposal.assignment)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Refuse: a parameter beside the groups has no place in the budget.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{param_name!r} is no group of this sampler, or has other choices there.",
            fix="suggest each group with the choices that the sampler was given, and nothing else.",
        )

    def _ahead(self, trials: Sequence[FrozenTrial]) -> Sequence[Proposed]:
        """What is left of the round that these trials have begun, or of the next."""
        running = self._follow(trials)
        return self._schedule.pending()[running:]

    def _follow(self, trials: Sequence[FrozenTrial]) -> int:
        """Go through the trials up to the first that runs; how many of ours run."""
        ends = (n for n, t in enumerate(trials) if not t.state.is_finished())
        first = next(ends, len(trials))
        finished = trials[:first]
        names = [(t.number, t.datetime_complete) for t in finished]
        if names[: len(self._read)] != self._read:
            self._schedule, self._read = self._made(), []
        for index in range(len(self._read), first):
            trial = self._trial(finished[index], finished[:index])
            if trial is not None:
                self._schedule.add(trial, is_proposed=not _is_given(finished[index]))
        self._read = names
        return sum(not _is_given(t) for t in trials[first:])

    def _trial(self, frozen: FrozenTrial, before: Sequence[FrozenTrial]) -> Trial | None:
        """What proposers need of a trial; None of one without a choice for every group."""
        if not self._space.distributions.keys() <= frozen.params.keys():
            return None
        assignment = self._space.assignment(frozen.params)
        attributes = frozen.user_attrs
        return Trial(
            number=frozen.number,
            stage=Stage(attributes.get("stage", Stage.SWAP)),
            name="",
            assignment=assignment,
            kl=_objective(frozen, before),
            stderr=math.nan,
            sequence_kl=(),
            tokens=0,
            is_stopped=attributes.get("is_stopped", frozen.state is TrialState.PRUNED),
            bpe=math.nan,
            fits=self._fits(frozen, assignment),
            seconds=0.0,
        )

    def _fits(self, frozen: FrozenTrial, assignment: Assignment) -> bool:
        """By the trial's own constraints; by the budget where it has none."""
        if frozen.constraints:
            return all(over <= 0 for over in frozen.constraints.values())
        if not self._options.allows(assignment):
            return False
        selection = self._options.selection(assignment)
        limits = self._options.knapsack.constraints
        return all(limit.cost(selection) <= limit.budget for limit in limits)


def _nothing_ahead(running: int) -> ConfigError:
    if running:
        return ConfigError(
            f"{running} trials were asked for and are not told; what comes next rests on them.",
            fix="tell them, those of ended workers as failed, or give the sampler together=N.",
        )
    return ConfigError(
        "every assignment that the sampler would propose is measured.",
        fix="end the study here, give the sampler more trials, or raise the budget.",
    )


def _is_given(trial: FrozenTrial) -> bool:
    """Whether it was enqueued, and not proposed."""
    return "fixed_params" in trial.system_attrs or trial.user_attrs.get("stage") in GIVEN


def _objective(trial: FrozenTrial, before: Sequence[FrozenTrial]) -> float:
    """The value; of a pruned trial that of the best whole one before it, plus how much more the
    trial has on the steps that it came to. NaN of a trial that failed.
    """
    if trial.state is not TrialState.PRUNED:
        return math.nan if trial.value is None else trial.value
    steps = trial.intermediate_values
    whole = [(t.value, t) for t in before if t.state is TrialState.COMPLETE and t.value is not None]
    rivals = [pair for pair in whole if steps.keys() <= pair[1].intermediate_values.keys()]
    if not steps or not rivals:
        return math.nan
    value, rival = min(rivals, key=lambda pair: pair[0])
    more = [kl - rival.intermediate_values[step] for step, kl in steps.items()]
    return value + float(np.mean(more))
