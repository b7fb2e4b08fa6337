"""A trial of a search as a trial of an Optuna study, and back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from autoquant.data.tokens import Split
from autoquant.files import json_number
from autoquant.measure.uncertainty import UnitTotals
from autoquant.plan.limit import Limit
from autoquant.search.trials import Trial
from autoquant.study.space import StudySpace


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """The sequences of the search tokens, in the order in which trials measure them."""

    document: tuple[int, ...]
    """Number of what is independent: its document, or its passage where documents are few."""
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, split: Split) -> Self:
        """The sequences of a split."""
        return cls(
            document=tuple(int(number) for batch in split.units for number in batch),
            tokens=tuple(len(row) for batch in split.batches for row in batch),
        )

    def by_document(self, kl: Sequence[float]) -> list[float]:
        """Mean KL of each document that the first `len(kl)` sequences show, nats per token.

        Args:
            kl: mean of each sequence, nats per token.
        """
        tokens = np.array(self.tokens[: len(kl)], dtype=np.float64)
        totals = UnitTotals.of(np.array(kl) * tokens, np.array(self.document[: len(kl)]), tokens)
        return [float(mean) for mean in totals.sums / totals.tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyForm:
    """How trials of one search are written into a study.

    The value of a trial is its KL, nats per token; a candidate that lost its race has the rival's
    KL plus their mean difference, as Optuna advises for pruned trials whose mean is known. Where
    the KL is not finite, or nothing was measured, the trial has failed. Step n of its intermediate
    values is the KL of sequence n. Each limit is a constraint: steps of the cost above the limit.
    """

    space: StudySpace
    limits: tuple[Limit, ...]
    sequences: Sequences

    def frozen(self, trial: Trial) -> FrozenTrial:
        """The finished trial of a study."""
        frozen = optuna.trial.create_trial(
            state=state_of(trial),
            value=trial.kl if math.isfinite(trial.kl) else None,
            params=self.space.params(trial.assignment),
            distributions=self.space.distributions,
            user_attrs=self.attributes(trial),
            intermediate_values=dict(steps_of(trial)),
            constraints=self.constraints(trial),
        )
        assert frozen.datetime_complete is not None
        frozen.datetime_start = frozen.datetime_complete - timedelta(seconds=trial.seconds)
        return frozen

    def attributes(self, trial: Trial) -> dict[str, Any]:
        """What a trial's parameters, value and constraints do not say."""
        record = {key: value for key, value in trial.to_dict().items() if key != "groups"}
        documents = self.sequences.by_document(trial.sequence_kl)
        return record | {
            "stderr": json_number(trial.stderr),
            "document_kl": [json_number(kl) for kl in documents],
        }

    def constraints(self, trial: Trial) -> dict[str, float]:
        """Steps of each cost above its limit; not above zero where the limit is kept."""
        return {
            limit.cost.name: limit.cost.total(trial.assignment) - limit.at_most
            for limit in self.limits
        }

    def about(self) -> dict[str, Any]:
        """The space, the limits and the sequences, as JSON values."""
        return {
            "space": self.space.to_dict(),
            "limits": {limit.cost.name: limit.at_most for limit in self.limits},
            "documents": list(self.sequences.document),
            "tokens": list(self.sequences.tokens),
        }


def state_of(trial: Trial) -> TrialState:
    """How the trial of a study ended."""
    return TrialState.COMPLETE if math.isfinite(trial.kl) else TrialState.FAIL


def steps_of(trial: Trial) -> list[tuple[int, float]]:
    """Intermediate values: the number of each sequence whose KL is finite, and its KL."""
    return [(step, kl) for step, kl in enumerate(trial.sequence_kl) if math.isfinite(kl)]


def trial_of(frozen: FrozenTrial, space: StudySpace) -> Trial:
    """What `StudyForm.frozen` was given.

    Raises:
        KeyError, TypeError, ValueError: it is no trial of a search.
    """
    assignment = space.assignment(frozen.params)
    record = frozen.user_attrs
    if (record["number"], record["digest"]) != (frozen.number, assignment.digest):
        raise ValueError(f"trial {frozen.number} is not the one that was measured")
    groups = {name: str(choice) for name, choice in assignment}
    return Trial.from_dict({**record, "groups": groups})
