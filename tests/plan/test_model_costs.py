"""Costs that follow from a model: what a token reads, and what it multiplies in BF16."""

import json
from fractions import Fraction

import pytest
from searchable import TOKEN_FLAGS, save_searchable, save_text
from tiny_models import change_tensors, save_model

from autoquant.formats import BF16, FP8, NVFP4, Choice
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Scope
from autoquant.plan.model_costs import CostKind, share_of_token
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import load_space
from autoquant.source.source import REFERENCE_MODEL, open_source

A16 = Choice.parse("nvfp4/mse/a16")


def plan_of(folder):
    return make_plan(open_source(folder), load_space("default"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Two blocks of 4 routed experts, 2 of them active, beside a shared one."""
    folder = tmp_path_factory.mktemp("active") / "model"
    return plan_of(save_model("qwen2_moe", folder, num_experts_per_tok=2))


def met_by_a_token(plan, group):
    """Elements of the shared expert, and top-k of E of the routed ones."""
    config = plan.source.text_config
    share = Fraction(config["num_experts_per_tok"], config["num_experts"])
    routed = sum(li.elements for li in group.linears if ".experts." in li.name)
    assert 0 < routed < group.elements
    return routed * share + group.elements - routed


def test_a_token_reads_top_k_of_the_routed_experts_and_all_of_the_shared_one(plan):
    active = plan.cost(CostKind.ACTIVE_BYTES)
    group = next(g for g in plan.groups if g.role == "experts")
    assert active.of(group.name, BF16) == 2 * met_by_a_token(plan, group)
    qkv = next(g for g in plan.groups if g.role == "qkv")
    for choice in (BF16, NVFP4):
        assert active.of(qkv.name, choice) == plan.accounting.group_bytes(qkv.name, choice)


@pytest.mark.parametrize("left_out", ["num_experts", "num_experts_per_tok"])
def test_every_expert_is_read_where_the_configuration_does_not_count_them(plan, left_out):
    config = {name: value for name, value in plan.source.text_config.items() if name != left_out}
    group = next(g for g in plan.groups if g.role == "experts")
    assert share_of_token(group, config) == 1
    assert share_of_token(group, plan.source.text_config) < 1


def test_embeddings_are_not_read_and_bf16_is_sixteen_bits(plan):
    active = plan.cost(CostKind.ACTIVE_BYTES)
    embeddings = plan.source.headers["model.embed_tokens.weight"]
    assert active.fixed_parts["embeddings fixed at BF16"] == 0
    untouched = Assignment.of({})
    for scope in Scope:
        number = plan.cost(CostKind.ACTIVE_BYTES, scope).number(untouched)
        assert number == pytest.approx(16.0, abs=1e-6)
    assert active.elements < plan.accounting.elements - embeddings.elements


def test_a_dense_model_reads_everything_but_its_embeddings(tmp_path):
    plan = plan_of(save_model("llama", tmp_path / "llama"))
    embeddings = plan.source.headers["model.embed_tokens.weight"]
    active = plan.cost(CostKind.ACTIVE_BYTES)
    assert active.elements == plan.accounting.elements - embeddings.elements


def test_embeddings_that_are_the_head_are_read_whole():
    """The reference model's README counts its parameters without the routers' correction biases."""
    plan = plan_of(REFERENCE_MODEL)
    biases = [tensor for tensor in plan.source.headers if "e_score_correction_bias" in tensor.name]
    elements = plan.cost(CostKind.ACTIVE_BYTES).elements - sum(t.elements for t in biases)
    assert elements == 3_819_008
    assert f"{elements:,} active per token" in (REFERENCE_MODEL / "README.md").read_text()


def test_a_head_that_is_stored_although_it_is_tied_is_read_once(tmp_path):
    tied = save_model("qwen3", tmp_path / "tied")
    alone = plan_of(tied).cost(CostKind.ACTIVE_BYTES)
    assert alone.elements == alone.accounting.elements

    def store_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(tied, store_head)
    stored = plan_of(tied)
    assert stored.accounting.elements > alone.accounting.elements
    assert stored.cost(CostKind.ACTIVE_BYTES).elements == alone.elements


def test_products_with_bf16_inputs_are_a_share_of_those_that_are_searched(plan):
    products = plan.cost(CostKind.BF16_PRODUCTS)
    searched = [group for group in plan.groups if group.name in plan.accounting.searched]
    whole = sum(
        met_by_a_token(plan, group) if group.role == "experts" else group.elements
        for group in searched
    )
    assert products.unit.one == whole
    assert products.unit.name == "BF16 multiply-adds per multiply-add of the searched layers"
    for quantized in (NVFP4, FP8):
        assert products.number(Assignment.of({g.name: quantized for g in searched})) == 0.0
    for kept in (BF16, A16):
        assert products.number(Assignment.of({g.name: kept for g in searched})) == 1.0
    qkv = next(group for group in searched if group.role == "qkv")
    one = Assignment.of({g.name: A16 if g is qkv else NVFP4 for g in searched})
    assert products.number(one) == pytest.approx(qkv.elements / whole)
    assert products.of(qkv.name, A16) == qkv.elements


def test_nothing_counts_where_nothing_is_searched(tmp_path):
    model = open_source(save_model("llama", tmp_path / "llama"))
    plan = make_plan(model, load_space("experts-only"))
    assert not plan.accounting.searched
    for cost in (plan.cost(CostKind.BITS, Scope.SEARCHED), plan.cost(CostKind.BF16_PRODUCTS)):
        assert cost.number(plan.floor) == 0.0
        assert cost.unit.most(0.5) == cost.total(plan.floor)


@pytest.mark.slow
def test_a_search_keeps_a_budget_of_active_bytes(autoquant, tmp_path):
    model = save_searchable("qwen3_moe", tmp_path / "model")
    text = save_text(tmp_path / "text")
    flags = ("--calibration", text, *TOKEN_FLAGS, "--trials", 4, "--no-mlflow", "--no-export")
    common = ("search", model, "--cost", "active-bytes", "--format", "json", *flags)
    result = autoquant(*common, "--budget-bpe", 8, "--out", tmp_path / "run")
    found = json.loads(result.stdout)
    assert found["cost"] == "active-bytes"
    assert 7 < found["active"]["bpe"]["checkpoint"] <= 8
    assert found["active"]["bytes_per_token"] < found["checkpoint_bytes"]
    (limit,) = found["limits"]
    assert limit["total"] == found["active"]["bytes_per_token"] <= limit["at_most"]
    assert limit["taken"] == found["active"]["bpe"]["checkpoint"]
    refused = autoquant(*common, "--budget-bpe", 5, "--out", tmp_path / "none")
    assert refused.exit_code == 3
    assert "embeddings" not in refused.stderr
