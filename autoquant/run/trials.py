"""The trials stage: candidates measured jointly, each trial in the study before the next begins."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from optuna import Study
from optuna.storages import BaseStorage

from autoquant.data.tokens import Split
from autoquant.measure.evaluator import Evaluator
from autoquant.plan.accounting import Accounting
from autoquant.run.config import SearchConfig
from autoquant.run.observer import Observer
from autoquant.search.history import History
from autoquant.search.limits import Bounds
from autoquant.search.problem import Problem
from autoquant.search.trials import Trial
from autoquant.store.run_directory import RunDirectory
from autoquant.study.driver import Driver
from autoquant.study.explore import Explored, explore, most_trials
from autoquant.study.journal import StudyLog, read_study, read_trials
from autoquant.study.live import LiveStudy
from autoquant.study.mirror import Mirror
from autoquant.study.record import Sequences, StudyForm
from autoquant.study.sampling import sampler_of
from autoquant.study.space import StudySpace
from autoquant.tracking import Tracker, TrialRecord


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The trials of one run, in its study, its tracker and before its observer."""

    run: RunDirectory
    study_name: str
    storage: BaseStorage | None
    """Where the study is repeated."""
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
        space = StudySpace.of(accounting)
        form = StudyForm(space=space, limits=problem.limits, sequences=Sequences.of(split))
        log = StudyLog.open(self.run, self.study_name, form)
        earlier = log.trials()
        self._record(earlier)
        history = History(earlier, elsewhere)
        mirror = self._mirror(log.study)

        def keep(trial: Trial) -> None:
            log.add(trial)
            self._record([trial])
            if mirror is not None:
                mirror.send()
            self.observer.trial(trial, history.best())

        driver = Driver(
            study=LiveStudy(form, earlier),
            history=history,
            evaluator=evaluator,
            accounting=accounting,
            fits=problem.fits,
            keep=keep,
            width=config.trials_at_once,
        )
        self.observer.stage("refine", most_trials(problem, config.trials) - len(earlier))
        explored = explore(
            problem,
            driver,
            lambda predictor: sampler_of(
                config.sampler,
                predictor,
                space,
                trials=config.trials,
                width=config.trials_at_once,
                seed=config.seed,
            ),
            trials=config.trials,
            bounds=Bounds(in_time, config.max_tokens),
            timed=timed,
        )
        if mirror is not None:
            mirror.finish()
        return history, explored

    def track(self) -> None:
        """Record the trials on disk, which the tracker and the storage may lack.

        Raises:
            RunConflict: the storage has a study of the name that is another search's.
        """
        self._record(read_trials(self.run.path))
        study = read_study(self.run.path)
        mirror = None if study is None else self._mirror(study)
        if mirror is not None:
            mirror.finish()

    def _mirror(self, study: Study) -> Mirror | None:
        """What repeats the study, and has sent what there is of it; None without a storage."""
        if self.storage is None:
            return None
        mirror = Mirror(source=study, storage=self.storage, warn=self.observer.warn)
        mirror.send()
        return mirror

    def _record(self, trials: Iterable[Trial]) -> None:
        for trial in trials:
            self.tracker.trial(_record(trial))


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
