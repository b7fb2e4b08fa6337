"""The study of a frontier: what searches of several budgets measured, by KL and by bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
from optuna.storages import JournalStorage

from autoquant.files import to_json, write_atomic
from autoquant.plan.accounting import Accounting
from autoquant.plan.assignment import Assignment
from autoquant.search.quiet import quietly
from autoquant.search.trials import Trial
from autoquant.store.records import sealed
from autoquant.study.journal import Lines, read_trials
from autoquant.study.space import StudySpace

FRONTIER = "frontier.log"
"""Beside the run directories of several budgets."""


def write_frontier(runs: Sequence[Path], accounting: Accounting) -> Path:
    """Write the study of a frontier beside run directories; a journal as `study.log` is one.

    Both values are to be small. A trial is an assignment that some budget's search measured to the
    end, each once; its attributes name the run directory and the number there.

    Args:
        runs: the run directories of the budgets, on the same search tokens.
        accounting: of the plan.

    Returns:
        The journal.

    Raises:
        SourceError: the study of a run is damaged.
    """
    folder, space = runs[0].parent, StudySpace.of(accounting)
    lines: list[str] = []
    storage = JournalStorage(Lines([], lambda line: lines.append(to_json(sealed(line)) + "\n")))
    with quietly():
        study = optuna.create_study(
            storage=storage,
            study_name=f"{folder.resolve().name}, frontier",
            directions=["minimize", "minimize"],
        )
        seen: set[Assignment] = set()
        for run in runs:
            for trial in read_trials(run):
                if trial.is_whole and trial.assignment not in seen:
                    seen.add(trial.assignment)
                    study.add_trial(_frozen(trial, run.name, space, accounting.checkpoint_bytes))
    target = folder / FRONTIER
    write_atomic(target, "".join(lines))
    return target


def _frozen(
    trial: Trial, run: str, space: StudySpace, bytes_of: Callable[[Assignment], int]
) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(
        values=[trial.kl, bytes_of(trial.assignment)],
        params=space.params(trial.assignment),
        distributions=space.distributions,
        user_attrs={
            "run": run,
            "number": trial.number,
            "digest": trial.assignment.digest,
            "bpe": trial.bpe,
        },
    )
