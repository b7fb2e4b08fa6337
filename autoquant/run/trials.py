"""The trials stage: candidates measured jointly, each trial on disk before the next begins."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

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
from autoquant.store.run_directory import TRIALS, RunDirectory
from autoquant.tracking import Tracker, TrialRecord


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The trials of one run, in its log, its tracker and before its observer."""

    run: RunDirectory
    tracker: Tracker
    observer: Observer

    def measure(
        self,
        config: SearchConfig,
        problem: Problem,
        evaluator: Evaluator,
        *,
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
            accounting: of the checkpoint.
            elsewhere: whole trials of other budgets on the same tokens.
            in_time: whether another trial may begin.
            timed: charges the time of a block to a stage.

        Raises:
            SourceError: no assignment within the budget has a finite KL.
        """
        earlier = self.track()
        history = History(earlier, elsewhere)
        driver = Driver(
            history=history,
            evaluator=evaluator,
            accounting=accounting,
            fits=problem.fits,
            keep=lambda trial: self._keep(trial, history.best()),
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

    def track(self) -> list[Trial]:
        """Record the trials on disk, which the tracker may lack; these trials, in their order."""
        trials = [Trial.from_dict(record) for record in self.run.records(TRIALS)]
        for trial in trials:
            self.tracker.trial(_record(trial))
        return trials

    def _keep(self, trial: Trial, best: Trial | None) -> None:
        self.run.append(TRIALS, trial.to_dict())
        self.tracker.trial(_record(trial))
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
