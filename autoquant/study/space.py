"""The space of a study: one categorical parameter for each open layer group."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from optuna.distributions import BaseDistribution, CategoricalDistribution

from autoquant.formats import Choice
from autoquant.plan.accounting import Accounting
from autoquant.plan.assignment import Assignment


@dataclass(frozen=True)
class StudySpace:
    """What the parameters of a study's trials may be, fixed for the study's life.

    A search may close a scale rule; the parameter keeps it, and nothing proposes it any more.
    """

    choices: Mapping[str, tuple[Choice, ...]]
    """Of every layer group, in checkpoint order."""

    @classmethod
    def of(cls, accounting: Accounting) -> Self:
        """The space of a plan, as it was before a search closed anything."""
        return cls({group.name: accounting.choices[group.name] for group in accounting.groups})

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """A categorical of the names of its choices for each group that has more than one."""
        return {
            group: CategoricalDistribution([str(choice) for choice in legal])
            for group, legal in self.choices.items()
            if len(legal) > 1
        }

    def params(self, assignment: Assignment) -> dict[str, str]:
        """The parameters of an assignment."""
        return {group: str(assignment[group]) for group in self.distributions}

    def assignment(self, params: Mapping[str, Any]) -> Assignment:
        """Every group of the model: as `params` say, and those that have one choice."""
        return Assignment.of(
            {
                group: Choice.parse(params[group]) if group in self.distributions else legal[0]
                for group, legal in self.choices.items()
            }
        )

    def to_dict(self) -> dict[str, list[str]]:
        """Group to the names of its choices."""
        return {group: [str(choice) for choice in legal] for group, legal in self.choices.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What `to_dict` wrote."""
        return cls({group: tuple(map(Choice.parse, legal)) for group, legal in data.items()})
