"""Budgets as integers: exact, resolved once, and refused where nothing keeps them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_model

from autoquant.errors import ConfigError, InfeasibleBudget
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Budget, Scope
from autoquant.plan.limit import Limit
from autoquant.plan.model_costs import CostKind
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import load_space
from autoquant.source.source import open_source


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = save_model("qwen2_moe", tmp_path_factory.mktemp("limit") / "model")
    return make_plan(open_source(folder), load_space("default"))


@given(
    st.decimals(min_value="0.01", max_value="33", places=7),
    st.sampled_from(Scope),
    st.sampled_from([CostKind.BITS, CostKind.ACTIVE_BYTES]),
)
def test_a_budget_is_the_most_bytes_whose_bits_do_not_exceed_it(plan, bits, scope, kind):
    limit = plan.limit(Budget(float(bits), scope), kind)
    unit = limit.cost.unit
    assert unit.number(limit.at_most) <= float(bits) < unit.number(limit.at_most + 1)
    assert 8 * (limit.at_most - unit.uncounted) <= bits * limit.cost.elements


@given(st.data())
def test_what_an_assignment_takes_is_the_smallest_budget_that_it_keeps(plan, data):
    scope, kind = data.draw(st.sampled_from(Scope)), data.draw(st.sampled_from(CostKind))
    assignment = Assignment.of(
        {name: data.draw(st.sampled_from(own)) for name, own in plan.options.choices.items()}
    )
    cost = plan.cost(kind, scope)
    taken = cost.number(assignment)
    limit = Limit.of(cost, taken)
    assert limit.fits(assignment)
    assert limit.at_most == cost.total(assignment)
    assert limit.taken(assignment) == taken
    if limit.at_most > cost.uncounted:
        assert not Limit.of(cost, taken * (1 - 1e-9)).fits(assignment)


def test_stored_bytes_are_those_of_the_checkpoint(plan):
    for assignment in (plan.floor, plan.ceiling):
        assert plan.cost(CostKind.BITS).total(assignment) == plan.accounting.checkpoint_bytes(
            assignment
        )
        for scope in Scope:
            bpe = plan.accounting.bpe(assignment, scope)
            assert plan.cost(CostKind.BITS, scope).number(assignment) == bpe


def test_the_searched_scope_does_not_count_what_is_closed(plan):
    limit = plan.limit(Budget(16.0, Scope.SEARCHED))
    closed = plan.options.choices.keys() - plan.accounting.searched
    assert "lm_head" in closed
    assert limit.at_most == plan.accounting.checkpoint_bytes(Assignment.of({}))


def test_feasible_budgets_pass(plan):
    choices = plan.options.choices
    plan.limit(Budget(plan.accounting.bpe(plan.floor))).require_feasible(choices)
    plan.limit(Budget(16.0)).require_feasible(choices)


@pytest.mark.parametrize("kind", [CostKind.BITS, CostKind.ACTIVE_BYTES])
@pytest.mark.parametrize("scope", Scope)
def test_infeasible_budget_names_the_floor_and_what_holds_it_up(plan, scope, kind):
    choices = plan.options.choices
    lowest = plan.cost(kind, scope).number(plan.floor)
    with pytest.raises(InfeasibleBudget, match=f"below the floor of {lowest:.3f}") as caught:
        plan.limit(Budget(4.0, scope), kind).require_feasible(choices)
    assert caught.value.exit_code == 3
    message = caught.value.message
    is_whole = scope is Scope.CHECKPOINT
    assert ("embeddings fixed at BF16 take" in message) == (is_whole and kind is CostKind.BITS)
    assert ("weights of the output head fixed at BF16 take" in message) == is_whole
    assert "layers in NVFP4 take" in message
    taken = [float(number) for number in re.findall(r"take (\d+\.\d+) bits", message)]
    assert len(taken) == (3 if is_whole else 1)
    assert taken == sorted(taken, reverse=True)
    assert 0.9 * lowest < sum(taken) < lowest + 0.02
    advised = float(caught.value.fix.split("at least ")[1].split()[0])
    assert lowest <= advised < lowest + 0.0101
    plan.limit(Budget(advised, scope), kind).require_feasible(choices)


@pytest.mark.parametrize("bits", [0.0, -1.0, 64.1, 1e30, float("nan"), float("inf")])
def test_a_budget_that_no_checkpoint_can_mean(bits):
    with pytest.raises(ConfigError, match="not between 0 and 64"):
        Budget(bits)


def test_the_widest_type_of_a_checkpoint_is_a_budget():
    assert Budget(64.0).bpe == 64.0


@pytest.mark.parametrize("number", [-0.1, float("nan"), float("inf")])
def test_a_limit_that_no_cost_can_mean(plan, number):
    with pytest.raises(ConfigError, match="not a number from 0 up"):
        Limit.of(plan.cost(CostKind.BF16_PRODUCTS), number)


def test_a_result_says_what_its_limit_counts(plan):
    limit = plan.limit(Budget(9.0))
    said = limit.to_dict(plan.floor)
    assert said == {
        "cost": "bits",
        "unit": "bits per element",
        "meaning": "",
        "is_bpe": True,
        "asked": 9.0,
        "taken": plan.accounting.bpe(plan.floor),
        "at_most": limit.at_most,
        "total": plan.accounting.checkpoint_bytes(plan.floor),
    }
    for scope, kind in ((Scope.SEARCHED, CostKind.BITS), (Scope.CHECKPOINT, CostKind.ACTIVE_BYTES)):
        assert not plan.limit(Budget(9.0, scope), kind).to_dict(plan.floor)["is_bpe"]
    assert not Limit.of(plan.cost(CostKind.BF16_PRODUCTS), 0.5).to_dict(plan.floor)["is_bpe"]
