"""The assignments that every search is measured against."""

from collections.abc import Callable, Iterator

from autoquant.formats import BF16, FP8, NVFP4, Choice
from autoquant.plan.assignment import Assignment
from autoquant.plan.linears import LayerGroup
from autoquant.search.problem import Problem

ATTENTION = frozenset({"qkv", "o"})


def _experts_only(group: LayerGroup) -> Choice:
    return NVFP4 if group.role == "experts" else BF16


def _experts_rest_fp8(group: LayerGroup) -> Choice:
    return NVFP4 if group.role == "experts" else FP8


def _attention_bf16(group: LayerGroup) -> Choice:
    return BF16 if group.role in ATTENTION else NVFP4


def _attention_fp8(group: LayerGroup) -> Choice:
    return FP8 if group.role in ATTENTION else NVFP4


_EVERYWHERE: dict[str, Callable[[LayerGroup], Choice]] = {
    "uniform nvfp4": lambda group: NVFP4,
    "uniform fp8": lambda group: FP8,
    "attention fp8, rest nvfp4": _attention_fp8,
    "attention bf16, rest nvfp4": _attention_bf16,
}
_WITH_EXPERTS: dict[str, Callable[[LayerGroup], Choice]] = {
    "experts nvfp4, rest bf16": _experts_only,
    "experts nvfp4, rest fp8": _experts_rest_fp8,
}
"""Recipes of published checkpoints: MiniMax-M2 NVFP4 and the Nemotron 3 family."""


def baselines(problem: Problem) -> Iterator[tuple[str, Assignment]]:
    """Yield distinct named assignments, whether or not they keep the budget.

    A group that cannot take a recipe's format takes the cheapest legal one of more bits; a recipe
    with a format that no group can take as wished is left out.
    """
    has_experts = any(group.role == "experts" for group in problem.groups)
    # Of two recipes that come to the same, the published one gives its name.
    recipes = _WITH_EXPERTS | _EVERYWHERE if has_experts else _EVERYWHERE
    seen: set[str] = set()
    for name, wish in recipes.items():
        assignment = problem.uniform(wish)
        wished = {wish(group).format for group in problem.groups}
        taken = {assignment[group.name].format for group in problem.groups}
        if wished <= taken and assignment.digest not in seen:
            seen.add(assignment.digest)
            yield name, assignment
