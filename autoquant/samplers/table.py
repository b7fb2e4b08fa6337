"""Groups of options under a budget, each with what it costs and is thought to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from autoquant.errors import ConfigError
from autoquant.plan.assignment import Assignment
from autoquant.search.knapsack import Knapsack
from autoquant.search.relaxation import Selection
from autoquant.search.surrogate import Surrogate


class Space(Protocol):
    """Assignments as the parameters of a study."""

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """A categorical of labels for each group, fixed for the study's life."""

    def params(self, assignment: Assignment) -> dict[str, Any]:
        """The parameters of an assignment."""

    def assignment(self, params: Mapping[str, Any]) -> Assignment:
        """The inverse of `params`."""


@dataclass(frozen=True)
class OptionTable:
    """Options of any kind, for a sampler outside of a search.

    Args:
        choices: labels of each group's options.
        knapsack: their costs, the budget, and the prior.
    """

    choices: Mapping[str, tuple[Any, ...]]
    knapsack: Knapsack

    @classmethod
    def of(
        cls,
        choices: Mapping[str, Sequence[Any]],
        costs: Mapping[str, Sequence[int]],
        budget: int,
        prior: Mapping[str, Sequence[float]],
    ) -> "OptionTable":
        """See `BudgetSampler`.

        Raises:
            ConfigError: a group lacks costs or a prior, or has fewer or more than options.
        """
        for name, table in (("costs", costs), ("prior", prior)):
            for group, labels in choices.items():
                count = len(table.get(group, ()))
                if count != len(labels):
                    raise ConfigError(
                        f"{name} has {count} numbers for {group}, which has {len(labels)} choices.",
                        fix=f"give {name} one number for each choice of each group.",
                    )
        return cls(
            {group: tuple(labels) for group, labels in choices.items()},
            Knapsack(
                scores=tuple(tuple(map(float, prior[group])) for group in choices),
                costs=tuple(tuple(map(int, costs[group])) for group in choices),
                budget=budget,
            ),
        )

    @cached_property
    def surrogate(self) -> Surrogate:
        """The prior, whose parts add up."""
        main = np.array([score for own in self.knapsack.scores for score in own])
        sizes = tuple(map(len, self.choices.values()))
        return Surrogate(sizes, main, np.zeros((len(main), len(main))), np.zeros(len(main)))

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """A categorical for each group."""
        return {group: CategoricalDistribution(labels) for group, labels in self.choices.items()}

    def params(self, assignment: Assignment) -> dict[str, Any]:
        """The label of each group."""
        return {group: assignment[group] for group in self.choices}

    def assignment(self, params: Mapping[str, Any]) -> Assignment:
        """Each group with its label."""
        return Assignment.of(cast("Mapping[str, Any]", {g: params[g] for g in self.choices}))

    def decode(self, selection: Selection) -> Assignment:
        """The labels of a selection; what proposers do with them is to compare them."""
        return self.assignment(
            {
                group: labels[option]
                for (group, labels), option in zip(self.choices.items(), selection, strict=True)
            }
        )

    def selection(self, assignment: Assignment) -> Selection:
        """The inverse of `decode`."""
        return tuple(labels.index(assignment[group]) for group, labels in self.choices.items())

    def allows(self, assignment: Assignment) -> bool:
        """Whether every group has one of its labels."""
        return all(assignment[group] in labels for group, labels in self.choices.items())

    def label(self, group: int, option: int) -> str:
        """A group and one of its labels, in words."""
        name = tuple(self.choices)[group]
        return f"{name} to {self.choices[name][option]}"
