"""The study that a search asks and tells, in memory."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import optuna
from optuna.samplers import BaseSampler

from autoquant.measure.race import Race
from autoquant.plan.assignment import Assignment
from autoquant.samplers import BudgetSampler, PairedPruner
from autoquant.samplers.schedule import Proposed
from autoquant.search.quiet import quietly
from autoquant.search.trials import Stage, Trial
from autoquant.study.record import StudyForm, state_of, steps_of

Asked = optuna.trial.Trial
"""A trial that was asked for and is not told yet."""


class LiveStudy:
    """Asks a sampler, races by a pruner, and is told what was measured.

    Args:
        form: how trials are written.
        earlier: trials of earlier processes, in their order.
    """

    def __init__(self, form: StudyForm, earlier: Iterable[Trial] = ()) -> None:
        self.form = form
        self._pruner = PairedPruner(form.sequences.document, form.sequences.tokens)
        with quietly():
            self._study = optuna.create_study(
                sampler=optuna.samplers.RandomSampler(0), pruner=self._pruner
            )
            self._study.add_trials([form.frozen(trial) for trial in earlier])

    def sample_by(self, sampler: BaseSampler) -> None:
        """Ask this sampler from now on."""
        self._study.sampler = sampler

    def pending(self) -> Sequence[Proposed] | None:
        """What our own sampler will answer before it is told more; None of another sampler."""
        sampler = self._study.sampler
        return sampler.pending(self._study) if isinstance(sampler, BudgetSampler) else None

    def coming(self) -> Sequence[Assignment]:
        """What our own sampler is likely to ask for after what is asked for; empty of others."""
        sampler = self._study.sampler
        return sampler.coming(self._study) if isinstance(sampler, BudgetSampler) else ()

    def count(self, stage: Stage) -> int:
        """How many trials of a stage are finished."""
        trials = self._study.get_trials(deepcopy=False)
        return sum(trial.user_attrs.get("stage") == stage for trial in trials)

    def enqueued(self, assignment: Assignment) -> Asked:
        """Ask for the trial of an assignment."""
        self._study.enqueue_trial(self.form.space.params(assignment))
        return self.ask()

    def ask(self) -> Asked:
        """Ask the sampler for the next trial."""
        return self._study.ask(self.form.space.distributions)

    def assignment(self, asked: Asked) -> Assignment:
        """What the trial asks to be measured."""
        return self.form.space.assignment(asked.params)

    def race(self, asked: Asked, rival: int | None) -> Race | None:
        """The race of a trial against that of the number `rival`; None without one."""
        asked.set_user_attr("rival", rival)
        return self._pruner.race(self._study, self._frozen(asked))

    def tell(self, asked: Asked, trial: Trial) -> None:
        """Finish a trial with what was measured of it."""
        for step, kl in steps_of(trial):
            asked.report(kl, step)
        for name, value in self.form.attributes(trial).items():
            asked.set_user_attr(name, value)
        for name, over in self.form.constraints(trial).items():
            asked.set_constraint(name, over)
        is_finite = math.isfinite(trial.kl)
        self._study.tell(asked, trial.kl if is_finite else None, state=state_of(trial))

    def _frozen(self, asked: Asked) -> Any:
        return self._study.get_trials(deepcopy=False)[asked.number]
