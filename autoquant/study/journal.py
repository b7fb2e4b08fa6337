"""The journal of a study in a run directory: Optuna's lines, each with a checksum as in every log.

Optuna's own reader takes the file as it is, so `optuna-dashboard` and `optuna.load_study` open it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from autoquant.errors import RunConflict
from autoquant.search.quiet import quietly
from autoquant.search.trials import Trial
from autoquant.store.records import VERSION, damaged, read_lines
from autoquant.store.run_directory import (
    STUDY,
    TRIALS,
    RunDirectory,
    differences,
    is_sealed,
    read_records,
)
from autoquant.study.record import StudyForm, trial_of
from autoquant.study.space import StudySpace

ABOUT = "autoquant"
"""Attribute of a study: its space, its limits, its sequences, and the signature of the search."""


class Lines(BaseJournalBackend):
    """The lines of a journal that one process writes.

    Args:
        lines: that are there.
        append: keeps another.
    """

    def __init__(
        self, lines: list[dict[str, Any]], append: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._lines, self._append = lines, append

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        return iter(self._lines[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        for log in logs:
            self._append(log)
            self._lines.append(json.loads(json.dumps(log)))


@dataclass(frozen=True, kw_only=True)
class StudyLog:
    """The study of one search, in its run directory. Use `StudyLog.open`."""

    study: optuna.Study
    form: StudyForm
    origin: Path
    """The journal."""

    @classmethod
    def open(cls, run: RunDirectory, name: str, form: StudyForm) -> Self:
        """Create the study, or go on with it.

        Args:
            run: held by this process.
            name: of the study, where it is new.
            form: how its trials are written.

        Raises:
            SourceError: the journal is damaged.
            RunConflict: it is another search's.
        """
        path = run.path / STUDY
        storage = _storage(path, lambda line: run.append(STUDY, line))
        about = {"signature": run.signature, **form.about()}
        with quietly():
            study = _only_study(storage, path)
            if study is None:
                study = optuna.create_study(storage=storage, study_name=name)
            found = study.user_attrs.get(ABOUT)
            if found is None:
                study.set_user_attr(ABOUT, about)
            elif found != about:
                raise _other_search(path, found, about)
        return cls(study=study, form=form, origin=path)

    def trials(self) -> list[Trial]:
        """What was added, in its order.

        Raises:
            SourceError: a trial is damaged.
        """
        return _trials(self.study, self.form.space, self.origin)

    def add(self, trial: Trial) -> None:
        """Keep a trial, whose number is the next; it is on the disk when this returns."""
        self.study.add_trial(self.form.frozen(trial))


def read_trials(folder: Path) -> list[Trial]:
    """The trials of the run in `folder`, in the order of their numbers; takes no lock.

    Raises:
        SourceError: the journal, or the log of an earlier version, is damaged.
        OtherSchema: a version with another schema wrote it.
    """
    path = folder / STUDY
    if not path.exists():
        return [Trial.from_dict(record) for record in read_records(folder, TRIALS)]
    study = read_study(folder)
    if study is None:
        return []
    try:
        space = StudySpace.from_dict(study.user_attrs[ABOUT]["space"])
    except Exception as error:
        raise damaged(str(path), f"has no space that this version understands ({error})") from error
    return _trials(study, space, path)


def read_study(folder: Path) -> optuna.Study | None:
    """The study of the run in `folder`, to be read; None before it has one. Takes no lock.

    Raises:
        SourceError: the journal is damaged.
    """
    path = folder / STUDY
    if not path.exists():
        return None
    with quietly():
        study = _only_study(_storage(path, _refuse), path)
    return study if study is not None and ABOUT in study.user_attrs else None


def _storage(path: Path, append: Callable[[Mapping[str, Any]], None]) -> JournalStorage:
    lines = read_lines(path, is_sealed=is_sealed(path.parent), is_foreign=_is_note)
    try:
        storage = JournalStorage(Lines(lines, append))
    except Exception as error:  # whatever Optuna makes of a line that it did not write
        raise _no_study(path, error) from error
    if lines and not optuna.get_all_study_names(storage):
        raise damaged(str(path), "has lost its first line")
    return storage


def _only_study(storage: JournalStorage, path: Path) -> optuna.Study | None:
    """The study of the journal; None of one that was killed before it had any."""
    names = optuna.get_all_study_names(storage)
    if not names:
        return None
    if len(names) > 1:
        raise damaged(str(path), f"holds {len(names)} studies, and a search has one")
    study = optuna.load_study(study_name=names[0], storage=storage)
    if ABOUT not in study.user_attrs and study.get_trials(deepcopy=False):
        raise damaged(str(path), "has lost its second line")
    return study


def _trials(study: optuna.Study, space: StudySpace, path: Path) -> list[Trial]:
    try:
        return [trial_of(frozen, space) for frozen in study.get_trials(deepcopy=False)]
    except Exception as error:  # a trial's attributes may be anything
        raise _no_study(path, error) from error


def _is_note(line: Mapping[str, Any]) -> bool:
    """Whether the line is an attribute that another program has added, as dashboards do."""
    return VERSION not in line and ("user_attr" in line or "system_attr" in line)


def _refuse(line: Mapping[str, Any]) -> None:
    raise AssertionError(f"a study that is read writes nothing: {line}")


def _no_study(path: Path, error: Exception) -> Exception:
    return damaged(str(path), f"is no study of a search ({type(error).__name__}: {error})")


def _other_search(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> RunConflict:
    """Of a study whose attributes are others."""
    signatures: Sequence[Mapping[str, Any]] = found.get("signature", {}), wanted["signature"]
    differing = differences(*signatures) or ["its space or its search tokens are others"]
    return RunConflict(
        f"the study {path} belongs to another search: {'; '.join(differing)}.",
        fix="give another --out, or start anew with --fresh (the earlier run is set aside).",
    )
