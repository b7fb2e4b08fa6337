"""Which experts see the calibration tokens: by routing, or all of them."""

import json

import pytest
import torch
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.checkpoint.source import open_source
from autoquant.data.tokens import Split
from autoquant.grouping import find_groups
from autoquant.model.inputs import ActivationMode
from autoquant.model.loading import load_model
from autoquant.model.quantized import QuantizedModel
from autoquant.probe.calibration import Calibration, calibrate
from autoquant.scoring.scorer import Scorer

CPU = torch.device("cpu")
BATCH = torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(0))
SPLIT = Split(name="calibration", batches=(BATCH,), digest="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_searchable("qwen3_moe", tmp_path_factory.mktemp("model") / "source")


def scorer_of(folder):
    groups = find_groups(open_source(folder))
    model = load_model(folder, CPU).model
    return Scorer(QuantizedModel(model, groups, mode=ActivationMode.W4A4), CPU)


def largest_inner(experts, hidden):
    """Largest magnitude that any expert's down projection would multiply, over all tokens."""
    gate, up = (hidden @ experts.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    return (experts.act_fn(gate) * up).abs().max().item()


@torch.inference_mode()
def test_every_expert_on_every_token_widens_ranges_alone(folder):
    scorer = scorer_of(folder)
    seen = {}
    for index, block in enumerate(scorer.trunk.blocks):
        block.mlp.experts.register_forward_pre_hook(
            lambda module, args, index=index: seen.update({index: args[0]})
        )
    natural = calibrate(scorer, SPLIT, lambda: None)
    by_routing = scorer.trunk.hidden(BATCH)
    shown = calibrate(scorer, SPLIT, lambda: None, all_experts=True)
    assert torch.equal(scorer.trunk.hidden(BATCH), by_routing)
    for block, counts in natural.expert_tokens.items():
        assert sum(counts) == 2 * BATCH.numel()
        assert shown.expert_tokens[block] == [2 * count for count in counts]
    widened = [n for n, amax in shown.input_amax.items() if amax != natural.input_amax[n]]
    assert widened
    assert all("down" in name for name in widened)
    for index, block in enumerate(scorer.trunk.blocks):
        [name] = [n for n in shown.input_amax if f"layers.{index}." in n and "down" in n]
        expected = largest_inner(block.mlp.experts, seen[index])
        assert shown.input_amax[name] == pytest.approx(expected, rel=0.01)


def covered(*tokens, total=1000):
    return Calibration(
        input_amax={}, unseen=(), tokens=total, expert_tokens={"a": [*tokens], "b": [500, 500]}
    )


def test_experts_that_saw_few_tokens_are_counted_with_the_tokens_that_would_do():
    warning = covered(64, 32, 904).warning()
    assert warning is not None
    assert "2 of 5 experts (40.0%) saw fewer than 128 of 1000 calibration tokens." in warning
    assert "--calibration-tokens 4000 would reach all" in warning
    assert "--calibrate-all-experts" in warning


def test_idle_experts_are_told_apart():
    calibration = covered(0, 64, 936)
    warning = calibration.warning()
    assert warning is not None
    assert "tokens, 1 of them none. About --calibration-tokens 2000 would reach those" in warning
    coverage = calibration.coverage()
    assert coverage is not None
    assert coverage.to_dict() == {
        "experts": 5,
        "few": 2,
        "idle": 1,
        "tokens": 1000,
        "needed": 2000,
        "threshold": 128,
        "share": 0.4,
    }


def test_enough_tokens_and_models_without_experts_are_no_news():
    assert covered(128, 872).warning() is None
    dense = Calibration(input_amax={}, unseen=(), tokens=10, expert_tokens={})
    assert dense.coverage() is None
    assert dense.warning() is None


@pytest.mark.slow
def test_a_search_says_and_keeps_what_experts_and_splits_saw(folder, autoquant, tmp_path):
    text = save_text(tmp_path / "text", documents=6)
    flags = ("--budget-bpe", 9, "--calibration", text, *TOKEN_FLAGS, "--trials", 0, "--no-mlflow")
    results = {}
    for name, more in {"routed": (), "all": ("--calibrate-all-experts",)}.items():
        done = autoquant(
            *("search", folder, *flags, *more, "--report-tokens", 10_000),
            *("--no-export", "--out", tmp_path / name),
        )
        assert done.exit_code == 0, done.stderr
        results[name] = json.loads((tmp_path / name / "result.json").read_text())
        assert ("saw fewer than 128 of" in done.stderr) == (name == "routed")
    assert results["routed"]["experts"] == {**results["all"]["experts"], "all_experts": False}
    assert results["all"]["experts"]["all_experts"] is True
    assert results["all"]["experts"]["experts"] == 8
    tokens = results["routed"]["tokens"]
    assert tokens["report"]["asked"] == 10_000 > tokens["report"]["tokens"]
    assert tokens["search"]["asked"] == 512 <= tokens["search"]["tokens"]
    digests = {r["tokens"]["report"]["digest"] for r in results.values()}
    assert len(digests) == 1
    conflict = autoquant(
        "search", folder, *flags, "--report-tokens", 10_000, "--out", tmp_path / "all"
    )
    assert conflict.exit_code == 5
