"""Which experts see the calibration tokens: by routing, or all of them."""

import json

import pytest
import torch
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.data.tokens import Split
from autoquant.measure.calibration import Calibration, calibrate
from autoquant.measure.scorer import Scorer
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

CPU = torch.device("cpu")
BATCH = torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(0))
SPLIT = Split.unrelated("calibration", (BATCH,), digest="")


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
    (by_routing,) = scorer.forward([BATCH])
    shown = calibrate(scorer, SPLIT, lambda: None, all_experts=True)
    assert torch.equal(next(scorer.forward([BATCH])), by_routing)
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
def test_commands_say_and_keep_what_experts_and_splits_saw(folder, autoquant, tmp_path):
    data = ("--calibration", save_text(tmp_path / "text", documents=6), *TOKEN_FLAGS)
    run, shown = tmp_path / "run", "--calibrate-all-experts"
    search = ("search", folder, "--budget-bpe", 9, *data, "--trials", 0, "--no-mlflow")
    done = autoquant(*search, shown, "--report-tokens", 10_000, "--no-export", "--out", run)
    assert done.exit_code == 0, done.stderr
    assert "saw fewer than" not in done.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["experts"]["all_experts"] is True
    assert result["experts"]["experts"] == 8
    assert 0 < result["experts"]["few"] <= 8
    tokens = result["tokens"]
    assert tokens["report"]["asked"] == 10_000 > tokens["report"]["tokens"]
    assert tokens["search"]["asked"] == 512 <= tokens["search"]["tokens"]
    by_routing = autoquant(*search, "--report-tokens", 10_000, "--out", run)
    assert by_routing.exit_code == 5
    assert "all_experts" in by_routing.stderr
    export = ("export", folder, "--assignment", run / "assignment.yaml", *data)
    routed = autoquant(*export, "--out", tmp_path / "routed")
    assert routed.exit_code == 0, routed.stderr
    assert "saw fewer than 128 of" in routed.stderr
    widened = autoquant(*export, shown, "--out", tmp_path / "shown")
    assert widened.exit_code == 0, widened.stderr
    assert "saw fewer than" not in widened.stderr
