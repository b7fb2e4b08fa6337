"""A worker's place in a search: what it is asked for, and what it answers."""

import platform
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from autoquant.errors import RunConflict
from autoquant.measure.evaluator import Evaluator, Request
from autoquant.study.joining.link import ABOUT, ANSWER, BEAT, HOST, OFFER, order_of
from autoquant.study.joining.watch import Watch

_GOODBYE = 2.0
"""Seconds in which a worker that leaves says so, if the storage answers."""


class Membership(Watch):
    """This worker's place in the study of a search. Use it as a context; leaving it leaves that.

    Args:
        storage: where the study is.
        name: of the study.
        about: what this worker has in common with the search.
        note: is told what happens to the worker.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        about: Mapping[str, Any],
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(self._exchange, note)
        self._storage, self._name, self._about = storage, name, about
        self._study: optuna.Study | None = None
        self._trial: optuna.Trial | None = None
        self._attributes: Mapping[str, Any] = {}
        """Of the study, as they were last seen."""
        self._offer: Mapping[str, Any] | None = None
        """What this worker measures with."""
        self._is_ready = False
        self._order: str | None = None
        self._answer: Mapping[str, Any] | None = None
        self._told: Mapping[str, Any] | None = None
        """The answer that the storage has."""
        self._beats = 0
        self._is_leaving = False

    def __enter__(self) -> "Membership":
        self._link.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_leaving = True
        self._link.stop(_GOODBYE)

    def offer(self) -> Mapping[str, Any] | None:
        """What the search measures with, when it has calibrated; None once it has ended.

        Raises:
            RunConflict: the storage does not answer, or the search is not heard of.
        """
        self._offer = self._wait(lambda: self._attributes.get(OFFER))
        return self._offer

    def serve(self, evaluator: Evaluator, told: Callable[[int], None]) -> int:
        """Register, and measure what the search asks for, until it has ended.

        Args:
            evaluator: measures with the search's offer.
            told: called with the number of trials of each order that is measured.

        Returns:
            How many trials were measured.

        Raises:
            RunConflict: the storage does not answer, the search is not heard of, or it has begun
                anew as another.
            Exception: what a measurement has raised.
        """
        self._is_ready, count = True, 0
        while (order := self._wait(self._next)) is not None:
            requests = [Request.from_dict(each) for each in order["requests"]]
            measured = [each.to_dict() for each in evaluator.measure(requests)]
            with self._link.changed:
                self._answer = {"id": order["id"], "measurements": measured}
            self._link.wake()
            count += len(requests)
            told(len(requests))
        return count

    def _has_ended(self) -> bool:
        return isinstance(self._link.error, KeyError)  # as Optuna says that there is no such study

    def _next(self) -> Mapping[str, Any] | None:
        """An order that is not measured yet, if there is one."""
        offer = self._attributes.get(OFFER)
        if offer is not None and (self._attributes.get(ABOUT), offer) != (self._about, self._offer):
            raise RunConflict(
                "the search has begun anew with other settings, versions or calibration.",
                fix="the same command joins again, where it has the same.",
            )
        if self._trial is None:
            return None
        order: Mapping[str, Any] | None = self._attributes.get(order_of(self._trial.number))
        if order is None or order["id"] == self._order:
            return None
        self._order = order["id"]
        return order

    def _exchange(self) -> None:
        if self._study is None:
            self._study = optuna.load_study(study_name=self._name, storage=self._storage)
        if self._is_ready and self._trial is None and not self._is_leaving:
            self._register(self._study)
        if self._trial is not None:
            self._tell(self._study, self._trial)
        attributes = self._study.user_attrs
        with self._link.changed:
            if attributes.get(BEAT) != self._attributes.get(BEAT):
                self._heard = time.monotonic()
            self._attributes = attributes

    def _register(self, study: optuna.Study) -> None:
        trial = study.ask()
        trial.set_user_attr(BEAT, [None, 0])
        trial.set_user_attr(HOST, platform.node())
        self._trial = trial

    def _tell(self, study: optuna.Study, trial: optuna.Trial) -> None:
        """Write what this worker has to say."""
        if self._is_leaving:
            study.tell(trial, state=TrialState.FAIL)
            return
        with self._link.changed:
            answer, order = self._answer, self._order
        if answer is not None and answer is not self._told:
            trial.set_user_attr(ANSWER, answer)
            self._told = answer
        self._beats += 1
        trial.set_user_attr(BEAT, [order, self._beats])
