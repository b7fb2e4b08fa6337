"""A trial of a search as a trial of an Optuna study, and back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

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


def frozen_trial(
    trial: Trial, space: StudySpace, limits: Sequence[Limit], sequences: Sequences
) -> FrozenTrial:
    """The finished trial of a study.

    Its value is the KL, nats per token; a candidate that lost its race has the rival's KL plus
    their mean difference, as Optuna advises for pruned trials whose mean is known. Where the KL is
    not finite the trial has failed. Step n of its intermediate values is the KL of sequence n. Each
    limit is a constraint: steps of the cost above the limit.
    """
    is_finite = math.isfinite(trial.kl)
    record = {key: v for key, v in trial.to_dict().items() if key != "groups"}
    record["stderr"] = json_number(trial.stderr)
    documents = sequences.by_document(trial.sequence_kl)
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if is_finite else TrialState.FAIL,
        value=trial.kl if is_finite else None,
        params=space.params(trial.assignment),
        distributions=space.distributions,
        user_attrs=record | {"document_kl": [json_number(kl) for kl in documents]},
        intermediate_values={
            step: kl for step, kl in enumerate(trial.sequence_kl) if math.isfinite(kl)
        },
        constraints={
            limit.cost.name: limit.cost.total(trial.assignment) - limit.at_most for limit in limits
        },
    )


def trial_of(frozen: FrozenTrial, space: StudySpace) -> Trial:
    """What `frozen_trial` was given.

    Raises:
        KeyError, TypeError, ValueError: it is no trial of a search.
    """
    assignment = space.assignment(frozen.params)
    record = frozen.user_attrs
    if (record["number"], record["digest"]) != (frozen.number, assignment.digest):
        raise ValueError(f"trial {frozen.number} is not the one that was measured")
    groups = {name: str(choice) for name, choice in assignment}
    return Trial.from_dict({**record, "groups": groups})
