"""One or two limits as a knapsack over the open groups, and its solutions as assignments."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from autoquant.errors import InfeasibleBudget
from autoquant.formats import CAST, Choice
from autoquant.measure.sensitivity import Sensitivity, keys_of
from autoquant.plan.accounting import Accounting
from autoquant.plan.assignment import Assignment
from autoquant.plan.limit import Limit
from autoquant.plan.linears import LayerGroup
from autoquant.search.knapsack import Constraint, Knapsack
from autoquant.search.relaxation import Selection

ScoreOf = Callable[[LayerGroup, Choice], float]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One model, one space, one limit or two, one set of sensitivities."""

    accounting: Accounting
    """Of the choices that are open; a search may close some."""
    limits: tuple[Limit, ...]
    """As the plan resolved them: closing choices does not change them."""
    sensitivity: Sensitivity

    @cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The open groups, in the order of the forward pass."""
        return tuple(g for g in self.accounting.groups if g.name in self.accounting.searched)

    @cached_property
    def fixed(self) -> dict[str, Choice]:
        """The only choice of every other group."""
        open_names = {group.name for group in self.groups}
        return {n: c[0] for n, c in self.accounting.choices.items() if n not in open_names}

    @cached_property
    def knapsack(self) -> Knapsack:
        """Open groups with their probed KL, nats per token, as scores."""
        first, *others = map(self._constraint, self.limits)
        return Knapsack(
            scores=self.scores(lambda group, choice: self.sensitivity[group.name, choice]),
            costs=first.costs,
            budget=first.budget,
            second=others[0] if others else None,
            finer=tuple(
                tuple(
                    tuple(choice.is_finer_than(than) for choice in self._choices(group))
                    for than in self._choices(group)
                )
                for group in self.groups
            ),
        )

    @property
    def keys(self) -> tuple[tuple[str, Choice], ...]:
        """(group, choice) of every option of the knapsack, group after group."""
        return tuple((g.name, choice) for g in self.groups for choice in self._choices(g))

    def scores(self, score_of: ScoreOf) -> tuple[tuple[float, ...], ...]:
        """Scores of every option; within a group, a finer choice never scores worse.

        One that measured worse than a coarser one did so by noise.
        """
        table = []
        for group in self.groups:
            choices = self._choices(group)
            scores = [score_of(group, choice) for choice in choices]
            for i, choice in enumerate(choices):
                coarser = [
                    score
                    for score, other in zip(scores, choices, strict=True)
                    if choice.is_finer_than(other)
                ]
                scores[i] = min([scores[i], *coarser])
            table.append(tuple(scores))
        return tuple(table)

    def restricted(self, rule: str) -> Knapsack | None:
        """The knapsack with one scale rule wherever there are any; options keep their indices.

        All rules cost the same, so it is enough that every other one scores worse. None where some
        group has scale rules, but not `rule`.
        """
        for group in self.groups:
            rules = {choice.scale_rule for choice in self._choices(group)} - {None, CAST}
            if rules and rule not in rules:
                return None
        worst = 2 * max(kl for kl in (1e-300, *self.sensitivity.kl.values()))

        def score(group: LayerGroup, choice: Choice) -> float:
            is_other = choice.scale_rule not in (None, rule)
            return worst if is_other else self.sensitivity[group.name, choice]

        return self.knapsack.with_scores(self.scores(score))

    def decode(self, selection: Selection) -> Assignment:
        """The assignment of every group of the model."""
        chosen = {
            group.name: self._choices(group)[i]
            for group, i in zip(self.groups, selection, strict=True)
        }
        return self.complete(chosen)

    def complete(self, chosen: dict[str, Choice]) -> Assignment:
        """All groups in checkpoint order: those named, and the fixed ones."""
        choices = self.fixed | chosen
        return Assignment.of({group.name: choices[group.name] for group in self.accounting.groups})

    def selection(self, assignment: Assignment) -> Selection:
        """The inverse of `decode`."""
        return tuple(self._choices(group).index(assignment[group.name]) for group in self.groups)

    def allows(self, assignment: Assignment) -> bool:
        """Whether every group has one of its choices."""
        return all(assignment[name] in c for name, c in self.accounting.choices.items())

    def label(self, group: int, option: int) -> str:
        """An open group and one of its choices, in words."""
        own = self.groups[group]
        return f"{own.name} to {self._choices(own)[option]}"

    def optimum(self) -> Assignment:
        """The solver's optimum: least summed KL of single groups within the limits."""
        return self.decode(self.knapsack.solve())

    def by_gradients(self) -> "Problem | None":
        """The problem with the gradients' estimates as sensitivities, where there are any."""
        estimate = self.sensitivity.estimate
        return (
            replace(self, sensitivity=replace(self.sensitivity, kl=estimate)) if estimate else None
        )

    def at(self, number: float) -> "Problem":
        """The same with another number, in its unit, for the first limit."""
        first, *others = self.limits
        return replace(self, limits=(Limit.of(first.cost, number), *others))

    def without(self, way: str) -> "Problem":
        """The problem with a scale rule or rounding closed wherever a group has other codes of the
        same format and input.
        """
        choices = {name: _without(legal, way) for name, legal in self.accounting.choices.items()}
        return replace(self, accounting=replace(self.accounting, choices=choices))

    def predicted(self, assignment: Assignment) -> float:
        """Sum of the groups' own KL, nats per token."""
        return sum(self.sensitivity[g.name, assignment[g.name]] for g in self.groups)

    def uniform(self, wish: Callable[[LayerGroup], Choice]) -> Assignment:
        """Every open group in the choice wished for, or the cheapest legal one of more bits."""
        return self.complete({g.name: self._nearest(g, wish(g)) for g in self.groups})

    def fits(self, assignment: Assignment) -> bool:
        """Whether the assignment keeps every limit."""
        return all(limit.fits(assignment) for limit in self.limits)

    def _choices(self, group: LayerGroup) -> tuple[Choice, ...]:
        return self.accounting.choices[group.name]

    def _constraint(self, limit: Limit) -> Constraint:
        """What the limit leaves to the open groups, and what their options take of it."""
        cost = limit.cost
        closed = cost.fixed + sum(cost.of(name, choice) for name, choice in self.fixed.items())
        return Constraint(
            costs=tuple(tuple(cost.of(g.name, c) for c in self._choices(g)) for g in self.groups),
            budget=limit.at_most - closed,
        )

    def _nearest(self, group: LayerGroup, wish: Choice) -> Choice:
        legal = self._choices(group)
        if wish in legal:
            return wish
        upward = [c for c in legal if c.format.weight_bits >= wish.format.weight_bits]
        return upward[0] if upward else legal[-1]


def _without(legal: Sequence[Choice], way: str) -> tuple[Choice, ...]:
    others = {choice.form for choice in legal if way not in (choice.scale_rule, choice.rounding)}
    return tuple(
        choice
        for choice in legal
        if way not in (choice.scale_rule, choice.rounding) or choice.form not in others
    )


def require_feasible(accounting: Accounting, limits: tuple[Limit, ...]) -> None:
    """Return if some legal assignment keeps every limit.

    Raises:
        InfeasibleBudget: none does; says the floor and what holds it up.
    """
    for limit in limits:
        limit.require_feasible(accounting.choices)
    if len(limits) < 2:
        return
    unmeasured = dict.fromkeys(keys_of(accounting.choices), 0.0)
    problem = Problem(
        accounting=accounting, limits=limits, sensitivity=Sensitivity(unmeasured, unmeasured)
    )
    least = problem.decode(problem.knapsack.least_of_second)
    first, second = limits
    if not second.fits(least):
        lowest, unit = second.taken(least), second.cost.unit.name
        raise InfeasibleBudget(
            f"no assignment was found that keeps both limits: within {first.asked:.15g} "
            f"{first.cost.unit.name} the least is {lowest:.3f} {unit}, and {second.asked:.15g} "
            "are allowed.",
            fix="raise one of the limits, or open more in the search space.",
        )
