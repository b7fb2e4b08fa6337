"""Bits that one token reads: routed experts by top-k of E, one row of the embeddings."""

from fractions import Fraction

import pytest
from searchable import TOKEN_FLAGS, save_searchable, save_text
from tiny_models import save_model

from autoquant.formats import BF16, NVFP4
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Scope
from autoquant.plan.cost import Cost, charged
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import load_space
from autoquant.source.source import open_source


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Two blocks of 4 routed experts, 2 of them active, beside a shared one."""
    folder = save_model(
        "qwen2_moe", tmp_path_factory.mktemp("active") / "model", num_experts_per_tok=2
    )
    return make_plan(open_source(folder), load_space("default"))


def test_a_token_reads_top_k_of_the_routed_experts_and_all_of_the_shared_one(plan):
    config = plan.source.text_config
    share = Fraction(config["num_experts_per_tok"], config["num_experts"])
    active = plan.charged(Cost.ACTIVE_BYTES)
    group = next(g for g in plan.groups if g.role == "experts")
    routed = sum(li.elements for li in group.linears if ".experts." in li.name)
    shared = group.elements - routed
    assert 0 < shared < group.elements
    assert active.group_bytes(group.name, BF16) == 2 * (routed * share + shared)
    qkv = next(g for g in plan.groups if g.role == "qkv")
    for choice in (BF16, NVFP4):
        assert active.group_bytes(qkv.name, choice) == plan.accounting.group_bytes(qkv.name, choice)


def test_embeddings_are_not_read_and_bf16_is_sixteen_bits(plan):
    active = plan.charged(Cost.ACTIVE_BYTES)
    embeddings = plan.source.headers["model.embed_tokens.weight"]
    assert active.tensor_bytes(embeddings.name) == 0
    untouched = Assignment.of({})
    for scope in Scope:
        assert active.bpe(untouched, scope) == pytest.approx(16.0, abs=1e-6)
    assert active.elements < plan.accounting.elements - embeddings.elements
    assert plan.charged(Cost.BITS) is plan.accounting


def test_a_dense_model_reads_everything_but_its_embeddings(tmp_path):
    plan = make_plan(open_source(save_model("llama", tmp_path / "llama")), load_space("default"))
    active = charged(plan.accounting, Cost.ACTIVE_BYTES, plan.source.text_config)
    embeddings = plan.source.headers["model.embed_tokens.weight"]
    assert active.elements == plan.accounting.elements - embeddings.elements


@pytest.mark.slow
def test_a_search_keeps_a_budget_of_active_bytes(autoquant, tmp_path):
    import json

    model = save_searchable("qwen3_moe", tmp_path / "model")
    text = save_text(tmp_path / "text")
    flags = ("--calibration", text, *TOKEN_FLAGS, "--trials", 4, "--no-mlflow", "--no-export")
    common = ("search", model, "--cost", "active-bytes", "--format", "json", *flags)
    result = autoquant(*common, "--budget-bpe", 8, "--out", tmp_path / "run")
    found = json.loads(result.stdout)
    assert found["cost"] == "active-bytes"
    assert 7 < found["active"]["bpe"]["checkpoint"] <= 8
    assert found["active"]["bytes_per_token"] < found["checkpoint_bytes"]
    refused = autoquant(*common, "--budget-bpe", 5, "--out", tmp_path / "none")
    assert refused.exit_code == 3
    assert "embeddings" not in refused.stderr
