"""Limits stay what they were when a search closes choices, and two of them hold at once."""

from dataclasses import replace

import pytest
from tiny_models import save_model

from autoquant.errors import InfeasibleBudget
from autoquant.formats import ScaleRule
from autoquant.measure.sensitivity import Sensitivity, keys_of
from autoquant.plan.budget import Budget, Scope
from autoquant.plan.limit import Limit
from autoquant.plan.model_costs import CostKind
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import parse_space
from autoquant.search.predictions import predicted_frontier
from autoquant.search.problem import Problem, require_feasible
from autoquant.search.surrogate import Surrogate
from autoquant.source.source import open_source

HARM = {"max": 8.0, "mse": 6.0, "fp8": 1.0, "a16": 4.0, "gptq": 2.0}
TWO_RULES = "scale_rules: [max, mse]\nrules:\n  - {match: experts, formats: [nvfp4]}\n"
CLOSED = f"schema_version: 1\nname: s\n{TWO_RULES}  - {{match: '*', formats: [fp8, bf16]}}\n"
OPEN = f"schema_version: 1\nname: s\n{TWO_RULES}  - {{match: '*', formats: [nvfp4, fp8, bf16]}}\n"
WITH_A16 = """
schema_version: 1
name: s
rules:
  - {match: head, formats: [bf16]}
  - {match: '*', formats: [nvfp4/mse, nvfp4/mse/a16, fp8, bf16]}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(save_model("qwen3_moe", tmp_path_factory.mktemp("limits") / "source"))


@pytest.fixture
def plan_of(source):
    return lambda space: make_plan(source, parse_space(space, "space.yaml"))


def problem_of(plan, *limits):
    kl = {
        (group, choice): HARM[str(choice).rpartition("/")[2]] * (1 + number / 50) * 1e-3
        for number, (group, choice) in enumerate(keys_of(plan.options.choices))
    }
    return Problem(
        accounting=plan.accounting,
        limits=limits,
        sensitivity=Sensitivity(kl, dict.fromkeys(kl, 0.0)),
    )


def test_a_search_that_is_feasible_stays_so_when_a_scale_rule_is_closed(plan_of):
    """The experts have one choice then, and the rest alone would not keep 5.5 bits."""
    plan = plan_of(CLOSED)
    floor = plan.accounting.bpe(plan.floor, Scope.SEARCHED)
    limit = plan.limit(Budget(floor + 0.1, Scope.SEARCHED))
    problem = problem_of(plan, limit)
    closed = problem.without(ScaleRule.MSE)
    assert len(closed.groups) < len(problem.groups)
    assert floor + 0.1 < 8
    found = closed.optimum()
    assert closed.fits(found)
    assert limit.taken(found) <= floor + 0.1
    assert closed.limits == problem.limits


def test_closing_a_scale_rule_leaves_the_budget_to_the_other_groups(plan_of):
    plan = plan_of(OPEN)
    limit = plan.limit(Budget(6.0, Scope.SEARCHED))
    problem = problem_of(plan, limit)
    before = problem.optimum()
    after = problem.without(ScaleRule.MSE).optimum()
    assert limit.cost.total(after) == limit.cost.total(before)
    assert {name: c.format for name, c in after} == {name: c.format for name, c in before}


def test_closing_a_rounding_leaves_a_format_that_has_no_other_codes(plan_of):
    formats = "nvfp4/mse, nvfp4/mse/gptq, fp8/gptq, bf16"
    plan = plan_of(f"schema_version: 1\nname: s\nrules: [{{match: '*', formats: [{formats}]}}]\n")
    problem = problem_of(plan, plan.limit(Budget(6.0)))
    left = {tuple(map(str, own)) for own in problem.without("gptq").accounting.choices.values()}
    assert left >= {("nvfp4/mse", "fp8/gptq", "bf16")}
    assert "nvfp4/mse/gptq" not in {name for own in left for name in own}


@pytest.fixture
def both(plan_of):
    """Bits, and multiply-adds in BF16, of a space with BF16 inputs."""
    plan = plan_of(WITH_A16)

    def call(bpe, share):
        products = Limit.of(plan.cost(CostKind.BF16_PRODUCTS), share)
        return problem_of(plan, plan.limit(Budget(bpe)), products)

    return call


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_bf16_inputs_go_where_they_help_most_within_their_share(both, share):
    problem = both(5.75, share)
    bits, products = problem.limits
    found = problem.optimum()
    assert bits.fits(found)
    assert products.fits(found)
    assert products.taken(found) <= share
    inputs = [choice.input for _, choice in found]
    assert ("a16" in inputs) == (share > 0)
    for selection in problem.knapsack.best(20):
        assert problem.fits(problem.decode(selection))
    assert problem.knapsack.solution.gap == pytest.approx(0.0, abs=1e-12)


def test_more_bf16_products_never_predict_a_worse_optimum(both):
    scores = [both(5.75, share).knapsack.solution.score for share in (0.0, 0.1, 0.3, 1.0)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]


def test_one_limit_that_nothing_keeps_is_refused_by_its_own_floor(both):
    problem = both(4.0, 1.0)
    with pytest.raises(InfeasibleBudget, match="bits per element is below the floor"):
        require_feasible(problem.accounting, problem.limits)


def test_two_limits_that_something_keeps_pass(plan_of):
    plan = plan_of(OPEN)
    floor = plan.floor
    limits = [Limit.of(cost, cost.number(floor)) for cost in map(plan.cost, list(CostKind)[:2])]
    require_feasible(plan.accounting, tuple(limits))
    for limit in limits:
        require_feasible(plan.accounting, (limit,))


def test_two_limits_that_nothing_keeps_together_are_refused(plan_of):
    """BF16 inputs need no input scale: without any, the fewest bytes are out of reach."""
    plan = plan_of(WITH_A16)
    problem = problem_of(
        plan,
        plan.limit(Budget(plan.accounting.bpe(plan.floor))),
        Limit.of(plan.cost(CostKind.BF16_PRODUCTS), 0.0),
    )
    for limit in problem.limits:
        limit.require_feasible(plan.options.choices)
    with pytest.raises(InfeasibleBudget, match=r"keeps both limits: within .* the least is 1\.000"):
        require_feasible(problem.accounting, problem.limits)
    with pytest.raises(InfeasibleBudget, match="both limits at once"):
        problem.optimum()


def test_the_frontier_leaves_out_what_the_second_limit_forbids(both):
    problem = both(5.75, 0.2)
    alone = replace(problem, limits=problem.limits[:1])
    fewer, all_of_it = (predicted_frontier(p, Surrogate.of(p)) for p in (problem, alone))
    assert 0 < len(fewer) < len(all_of_it)
    assert min(row["bpe"] for row in fewer) > min(row["bpe"] for row in all_of_it)
