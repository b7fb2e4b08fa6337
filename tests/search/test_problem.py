"""The knapsack of a model, its baselines, and which candidates are proposed."""

import pytest
from tiny_models import save_model

from autoquant.formats import BF16, FP8, NVFP4, Choice, ScaleRule
from autoquant.measure.sensitivity import Sensitivity, keys_of
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Budget, Scope
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import load_space, parse_space
from autoquant.search.problem import Problem
from autoquant.search.propose.baselines import baselines
from autoquant.source.source import open_source

MSE = Choice(NVFP4.format, ScaleRule.MSE)
HARM = {"nvfp4/max": 8.0, "nvfp4/mse": 6.0, "nvfp4/four_over_six": 7.0, "fp8": 1.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(save_model("qwen3_moe", tmp_path_factory.mktemp("moe") / "source"))


@pytest.fixture
def problem_of(source):
    def call(bpe=6.0, scope=Scope.CHECKPOINT, space="default", **changes):
        chosen = parse_space(space, "space.yaml") if "\n" in space else load_space(space)
        plan = make_plan(source, chosen)
        kl = {
            (group, choice): HARM[str(choice)] * (1 + number / 100) * 1e-3
            for number, (group, choice) in enumerate(keys_of(plan.options.choices))
        }
        kl |= changes.get("kl", {})
        sensitivity = Sensitivity(kl, dict.fromkeys(kl, 0.0))
        return Problem(
            accounting=plan.accounting,
            limits=(plan.limit(Budget(bpe, scope)),),
            sensitivity=sensitivity,
        )

    return call


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("bpe", [5.75, 8, 16])
def test_solutions_keep_and_fill_the_budget(problem_of, scope, bpe):
    problem = problem_of(bpe, scope)
    for selection in problem.knapsack.best(20):
        assignment = problem.decode(selection)
        assert problem.fits(assignment)
        assert problem.accounting.bpe(assignment, scope) <= bpe
        assert problem.selection(assignment) == selection
        assert {name for name, _ in assignment} == {g.name for g in problem.accounting.groups}


def test_the_best_scale_rule_is_chosen_and_max_alone_where_asked(problem_of):
    problem = problem_of()
    free = problem.optimum()
    assert {c for _, c in free if c.format is NVFP4.format} == {MSE}
    restricted = problem.restricted(ScaleRule.MAX)
    assert restricted is not None
    assert {c for _, c in problem.decode(restricted.solve()) if c.format is NVFP4.format} == {NVFP4}


def test_one_rule_only_is_no_question_where_the_space_lacks_it(problem_of):
    space = "schema_version: 1\nname: s\nrules:\n  - {match: '*', formats: [nvfp4/mse, bf16]}\n"
    assert problem_of(space=space).restricted(ScaleRule.MAX) is None


def test_more_bits_never_score_worse(problem_of):
    name = problem_of().groups[0].name
    problem = problem_of(kl={(name, FP8): 1.0})
    scores = dict(zip(problem.accounting.choices[name], problem.knapsack.scores[0], strict=True))
    assert scores[FP8] == min(score for choice, score in scores.items() if choice != BF16)


def test_baselines_are_distinct_and_named(problem_of):
    found = dict(baselines(problem_of()))
    assert set(found) >= {"uniform nvfp4", "uniform fp8", "experts nvfp4, rest bf16"}
    assert len({assignment.digest for assignment in found.values()}) == len(found)
    for group in problem_of().groups:
        is_experts = group.role == "experts"
        recipe = found["experts nvfp4, rest fp8"]
        assert recipe[group.name] == (NVFP4 if is_experts else FP8)


def test_recipes_that_the_space_forbids_are_no_baselines(problem_of):
    space = "schema_version: 1\nname: s\nrules:\n  - {match: '*', formats: [fp8, bf16]}\n"
    assert [name for name, _ in baselines(problem_of(space=space))] == ["uniform fp8"]


def space_of(*formats):
    return (
        f"schema_version: 1\nname: s\nrules:\n  - {{match: '*', formats: [{', '.join(formats)}]}}\n"
    )


@pytest.mark.parametrize(
    ("formats", "wish", "taken"),
    [
        (["fp8", "bf16"], FP8, FP8),
        (["fp8", "bf16"], NVFP4, FP8),
        (["nvfp4/mse", "fp8", "bf16"], NVFP4, MSE),
        (["nvfp4/mse", "bf16"], FP8, BF16),
        (["nvfp4/max", "nvfp4/mse", "fp8"], BF16, FP8),
    ],
)
def test_a_choice_that_a_group_lacks_is_the_cheapest_of_no_fewer_bits_or_else_the_dearest(
    problem_of, formats, wish, taken
):
    problem = problem_of(space=space_of(*formats))
    assignment = problem.uniform(lambda _: wish)
    assert {assignment[group.name] for group in problem.groups} == {taken}


def test_predictions_add_up(problem_of):
    problem = problem_of()
    names = [group.name for group in problem.groups]
    one = Assignment.of({names[0]: MSE})
    other = Assignment.of({names[1]: FP8})
    both = Assignment.of({names[0]: MSE, names[1]: FP8})
    assert problem.predicted(both) == pytest.approx(
        problem.predicted(one) + problem.predicted(other)
    )
