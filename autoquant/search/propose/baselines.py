"""The assignments that every search is measured against, from `recipes.yaml` beside this file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from autoquant.formats import Choice
from autoquant.plan.assignment import Assignment
from autoquant.plan.linears import LayerGroup
from autoquant.search.problem import Problem


@dataclass(frozen=True, slots=True)
class Recipe:
    """A choice for every group, by its role."""

    name: str
    everywhere: Choice
    roles: Mapping[str, Choice]
    """Choices of roles that differ."""
    needs: str | None
    """A role without which the recipe means nothing."""

    def wish(self, group: LayerGroup) -> Choice:
        """What the group is to take."""
        return self.roles.get(group.role, self.everywhere)


@cache
def recipes() -> tuple[Recipe, ...]:
    """Every recipe, in the order of the file."""
    import yaml

    rows = yaml.safe_load(files(__package__).joinpath("recipes.yaml").read_text(encoding="utf-8"))
    return tuple(
        Recipe(
            name=row["name"],
            everywhere=Choice.parse(row["everywhere"]),
            roles={role: Choice.parse(text) for role, text in row.get("roles", {}).items()},
            needs=row.get("needs"),
        )
        for row in rows
    )


def baselines(problem: Problem) -> Iterator[tuple[str, Assignment]]:
    """Yield distinct named assignments, whether or not they keep the budget.

    A group that cannot take a recipe's format takes the cheapest legal one of more bits; a recipe
    with a format that no group can take as wished is left out.
    """
    roles = {group.role for group in problem.groups}
    seen: set[str] = set()
    for recipe in recipes():
        if recipe.needs is not None and recipe.needs not in roles:
            continue
        assignment = problem.uniform(recipe.wish)
        wished = {recipe.wish(group).format for group in problem.groups}
        taken = {assignment[group.name].format for group in problem.groups}
        if wished <= taken and assignment.digest not in seen:
            seen.add(assignment.digest)
            yield recipe.name, assignment
