"""The search's side: who has joined, and what the storage is told."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from autoquant.errors import RunConflict
from autoquant.search.quiet import quietly
from autoquant.study.joining import link
from autoquant.study.joining.link import ABOUT, BEAT, HOST, OFFER, SUFFIX, Link
from autoquant.study.joining.worker import JoinedWorker
from autoquant.study.mirror import ANSWERS_WITHIN, no_answer

_LOOKS = 5
"""Looks at the beat of a study that is there already, one each interval."""


def _require_alone(study: optuna.Study) -> None:
    """Return if no search beats in the study; a killed one leaves a last beat.

    Raises:
        RunConflict: one does.
    """
    beats = [study.user_attrs.get(BEAT)]
    while beats[0] is not None and len(beats) <= _LOOKS:
        time.sleep(link.INTERVAL)
        beats.append(study.user_attrs.get(BEAT))
        if len({str(beat) for beat in beats}) > 2:
            name = study.study_name.removesuffix(SUFFIX)
            raise RunConflict(
                f"the search {name!r} is in progress in this --study-storage, with these settings.",
                fix="take part in it with `autoquant join`, wait for its end, or give another "
                "--study-storage.",
            )


class Roster:
    """The workers that have joined a search. Use `Roster.open`, as a context.

    Leaving the context without an error deletes the study, which ends the workers. Otherwise it
    stays, and they wait for the search to go on.

    Args:
        storage: where the study is.
        study: of the workers.
    """

    def __init__(self, storage: BaseStorage, study: optuna.Study) -> None:
        self._storage, self._study = storage, study
        self._session, self._beats = uuid4().hex, 0
        self._posts: dict[str, Any] = {}
        """Attributes to be written."""
        self._workers: dict[int, JoinedWorker] = {}
        self._is_over = False
        self._link = Link(self._exchange)

    @classmethod
    def open(cls, storage: BaseStorage, name: str, about: Mapping[str, Any]) -> Self:
        """Create the study of workers, or go on with the one that a killed search has left.

        Args:
            storage: where.
            name: of the study.
            about: what a worker must have in common with the search, JSON values.

        Raises:
            RunConflict: the storage does not answer, or another search of these settings is in
                progress there.
        """
        try:
            with quietly():
                study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
            _require_alone(study)
            study.set_user_attr(OFFER, None)
            study.set_user_attr(ABOUT, about)
        except RunConflict:
            raise
        except Exception as error:  # each kind of storage has errors of its own
            raise no_answer("the study's storage", error) from error
        return cls(storage, study)

    def __enter__(self) -> Self:
        self._link.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over = kind is None
        self._link.stop(ANSWERS_WITHIN if self._is_over else 0.0)

    def offer(self, offer: Mapping[str, Any]) -> None:
        """Say what workers measure with; from now on they may register.

        Args:
            offer: JSON values.
        """
        with self._link.changed:
            self._post(OFFER, offer)

    def newcomers(self) -> list[JoinedWorker]:
        """Workers that are there and that no pool has, for a pool that takes them."""
        with self._link.changed:
            found = [w for w in self._workers.values() if w.is_there and not w.is_taken]
            for worker in found:
                worker.is_taken = True
        return found

    def _post(self, name: str, value: Any) -> None:
        self._posts[name] = value
        self._link.wake()

    def _exchange(self) -> None:
        if self._is_over:
            optuna.delete_study(study_name=self._study.study_name, storage=self._storage)
            return
        with self._link.changed:
            posts = dict(self._posts)
        for name, value in posts.items():
            self._study.set_user_attr(name, value)
        self._beats += 1
        self._study.set_user_attr(BEAT, [self._session, self._beats])
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        with self._link.changed:
            for name, value in posts.items():
                if self._posts[name] is value:
                    del self._posts[name]
            self._hear({trial.number: trial.user_attrs for trial in trials})

    def _hear(self, found: Mapping[int, Mapping[str, Any]]) -> None:
        for number in self._workers.keys() - found.keys():
            self._workers.pop(number).hear(None)
        for number, attributes in found.items():
            if number not in self._workers and HOST in attributes:
                self._workers[number] = JoinedWorker(
                    number, str(attributes[HOST]), self._link, self._post
                )
            if number in self._workers:
                self._workers[number].hear(attributes)
