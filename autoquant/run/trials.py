"""The trials stage: candidates measured jointly, each trial in the study before the next begins."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoquant.data.tokens import Split
from autoquant.measure.evaluator import Evaluator
from autoquant.plan.accounting import Accounting
from autoquant.run.config import SearchConfig
from autoquant.run.observer import Observer
from autoquant.search.driver import Driver
from autoquant.search.explore import Effort, Explored, explore, most_trials
from autoquant.search.history import History
from autoquant.search.limits import Bounds
from autoquant.search.problem import Problem
from autoquant.search.trials import Trial
from autoquant.store.run_directory import RunDirectory
from autoquant.tracking import Tracker, TrialRecord

if TYPE_CHECKING:
    from autoquant.study.journal import StudyLog


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The trials of one run, in its study, its tracker and before its observer."""

    run: RunDirectory
    study_name: str
    tracker: Tracker
    observer: Observer

    def measure(
        self,
        config: SearchConfig,
        problem: Problem,
        evaluator: Evaluator,
        *,
        split: Split,
        accounting: Accounting,
        elsewhere: Iterable[Trial],
        in_time: Callable[[], bool],
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> tuple[History, Explored]:
        """Measure everything that a search measures jointly on its search tokens.

        Args:
            config: of the search.
            problem: its knapsack.
            evaluator: measures candidates.
            split: the search tokens.
            accounting: of the checkpoint.
            elsewhere: whole trials of other budgets on the same tokens.
            in_time: whether another trial may begin.
            timed: charges the time of a block to a stage.

        Raises:
            SourceError: no assignment within the budget has a finite KL, or the study is damaged.
            RunConflict: the study is another search's.
        """
        study = self._study(problem, accounting, split)
        earlier = study.trials()
        self._record(earlier)
        history = History(earlier, elsewhere)
        driver = Driver(
            history=history,
            evaluator=evaluator,
            accounting=accounting,
            fits=problem.fits,
            keep=lambda trial: self._keep(study, trial, history.best()),
            width=config.trials_at_once,
        )
        self.observer.stage("refine", most_trials(problem, config.trials) - len(earlier))
        explored = explore(
            problem,
            driver,
            Effort.of(config.trials, reweight=config.reweight_trials),
            seed=config.seed,
            bounds=Bounds(in_time, config.max_tokens),
            timed=timed,
        )
        return history, explored

    def track(self) -> None:
        """Record the trials on disk, which the tracker may lack."""
        from autoquant.study.journal import read_trials

        self._record(read_trials(self.run.path))

    def _record(self, trials: Iterable[Trial]) -> None:
        for trial in trials:
            self.tracker.trial(_record(trial))

    def _study(self, problem: Problem, accounting: Accounting, split: Split) -> "StudyLog":
        from autoquant.study.journal import StudyLog
        from autoquant.study.record import Sequences
        from autoquant.study.space import StudySpace

        return StudyLog.open(
            self.run,
            self.study_name,
            space=StudySpace.of(accounting),
            limits=problem.limits,
            sequences=Sequences.of(split),
        )

    def _keep(self, study: "StudyLog", trial: Trial, best: Trial | None) -> None:
        study.add(trial)
        self._record([trial])
        self.observer.trial(trial, best)


def _record(trial: Trial) -> TrialRecord:
    return TrialRecord(
        number=trial.number,
        origin=f"{trial.stage}: {trial.name}",
        kl=trial.kl,
        bpe=trial.bpe,
        fits=trial.fits,
        seconds=trial.seconds,
        assignment=trial.assignment,
    )
