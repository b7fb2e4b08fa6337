"""`autoquant plan --forecast`: where weights will be, by the sizes that loading goes by, and how
often they will be read.
"""

import json
from dataclasses import replace

import pytest
import torch
from searchable import TOKEN_FLAGS, save_searchable, save_text
from tiny_models import save_model

from autoquant.codes.held import Weights
from autoquant.formats import BF16
from autoquant.measure import session
from autoquant.model.loading import load_model, sizes_of
from autoquant.model.streaming import placement
from autoquant.model.streaming.work import KEPT_LOGIT_BYTES
from autoquant.plan.grouping import find_groups
from autoquant.run.config import PlanConfig
from autoquant.run.cpu_work import (
    COMPARED_BYTES,
    GRAPH_BYTES,
    KERNEL_BYTES,
    KERNELS,
    PAIR_BYTES,
    SCORE_BYTES,
    work_bytes,
)
from autoquant.run.machines import forecast as forecasting
from autoquant.run.opening import open_plan
from autoquant.run.signature import FINALISTS
from autoquant.search.propose.baselines import recipes
from autoquant.source.source import open_source
from autoquant.store.run_directory import WORK, read_records

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["llama", "minimax_m2", "deepseek_v3", "zamba2"])
def test_sizes_are_those_of_the_model_when_it_is_loaded(tmp_path, monkeypatch, kind):
    folder = save_searchable(kind, tmp_path / kind)
    seen, choose = [], placement.choose

    def spy(sizes, device, allowance, *, present, **others):
        assert present == sizes.outside  # which is in memory by then
        seen.append(sizes)
        return choose(sizes, device, allowance, present=present, **others)

    monkeypatch.setattr(placement, "choose", spy)
    load_model(folder, CPU)
    assert seen == [sizes_of(open_source(folder))]


def forecast(autoquant, *arguments):
    result = autoquant("plan", *arguments, "--forecast", "--format", "json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["forecast"]


def test_weights_are_resident_where_they_fit_and_else_on_the_disk(autoquant, tmp_path):
    model = save_model("qwen2_moe", tmp_path / "model", num_hidden_layers=40)
    flags = (model, "--device", "cpu", "--search-tokens", 4096, "--effort", "fast")
    found = forecast(autoquant, *flags, "--host-memory", "4GiB")
    assert (found["weights"], found["device"]) == ("resident", "cpu")
    sizes = with_work(model)
    needed, least = (sizes.on_device(w, is_gpu=False) for w in (Weights.RESIDENT, Weights.DISK))
    states = 40 * 4096 * sizes.width * 2
    assert needed == sizes.all + 2 * sizes.work + placement.WORK_BYTES
    kept = found["device_bytes"] - needed - states
    assert 2 * sizes.all < kept <= 9 * sizes.all, "codes"
    between = (needed + least) // 2
    less = forecast(autoquant, *flags, "--host-memory", between)
    assert less["weights"] == "disk"
    assert less["device_bytes"] <= between
    assert less["weight_bytes"] == found["weight_bytes"] >= 40 * found["largest_block_bytes"]
    shown = autoquant("plan", *flags, "--host-memory", between, "--forecast")
    assert "of cpu: blocks of 0.00 GB from the disk" in shown.stdout


def with_work(model):
    """Sizes of a model, with the work of a search of its open groups."""
    config = PlanConfig.of({"model": str(model)})
    plan = open_plan(config)
    groups = [g for g in plan.groups if plan.options.choices[g.name] != (BF16,)]
    return replace(sizes_of(plan.source), work=work_bytes(config, plan.source, groups))


def test_work_is_that_of_a_batch_in_the_widest_stage(tmp_path, monkeypatch):
    """Or of attention that writes out its pairs, where sequences are long; and kept logits."""
    monkeypatch.setenv("AUTOQUANT_CPU_PRODUCTS", "float32")
    folder = save_searchable("minimax_m2", tmp_path / "model", max_position_embeddings=8192)
    source = open_source(folder)
    groups = [group for group in find_groups(source) if group.layer is not None]
    text = source.text_config

    def work(groups, **settings):
        return work_bytes(PlanConfig.of({"model": str(source.path), **settings}), source, groups)

    few = {"sequence_length": 32, "batch_tokens": 256, "search_tokens": 512, "report_tokens": 32}
    logits = 4 * 512 * text["vocab_size"]
    scores = SCORE_BYTES * (1 + FINALISTS + len(recipes()))
    taken = work(groups, **few) - logits - COMPARED_BYTES - 32 * scores
    share = text["num_experts_per_tok"] / text["num_local_experts"]
    numbers = sum(
        (own.in_features + own.out_features) * (share if group.role == "experts" else 1)
        for group in groups
        if group.layer == groups[0].layer
        for own in group.linears
    )
    assert taken == pytest.approx(GRAPH_BYTES * 256 * numbers, rel=1e-2)
    assert work(groups[:1], **few) < work(groups, **few)
    long = few | {"sequence_length": 8192, "batch_tokens": 8192}
    pairs = PAIR_BYTES * text["num_attention_heads"] * 8192**2
    assert work(groups, **long) == pairs + logits + 32 * scores
    assert work(groups, **few | {"report_tokens": 64}) == work(groups, **few) + 32 * scores
    many = {**few, "search_tokens": 2**30}
    assert work(groups, **many) == work(groups, **few) - logits + KEPT_LOGIT_BYTES


def test_kernels_count_where_experts_get_numbers_of_tokens_that_differ(tmp_path, monkeypatch):
    """oneDNN compiles one for each number, of products in BF16."""

    def work(source, role):
        groups = [group for group in find_groups(source) if group.role == role]
        assert groups
        found = []
        for policy in ("float32", "bf16"):
            monkeypatch.setenv("AUTOQUANT_CPU_PRODUCTS", policy)
            config = PlanConfig.of({"model": str(source.path)})
            found.append(work_bytes(config, source, groups))
        return found[1] - found[0]

    some = open_source(save_searchable("minimax_m2", tmp_path / "some"))
    assert work(some, "experts") == KERNELS * KERNEL_BYTES
    assert work(some, "qkv") == 0
    count = some.text_config["num_local_experts"]
    every = save_searchable("minimax_m2", tmp_path / "every", num_experts_per_tok=count)
    assert work(open_source(every), "experts") == 0


def test_sequences_are_cut_as_a_search_cuts_them(autoquant, tmp_path):
    model = save_searchable("llama", tmp_path / "model", max_position_embeddings=64)
    flags = (model, "--device", "cpu", "--weights", "disk", "--batch-tokens", 64)
    found = forecast(autoquant, *flags)
    assert found == forecast(autoquant, *flags, "--sequence-length", 64)
    longer = save_searchable("llama", tmp_path / "longer", max_position_embeddings=4096)
    assert found["device_bytes"] < forecast(autoquant, longer, *flags[1:])["device_bytes"]


def test_what_tokenizing_takes_is_given_back_before_the_work_begins(
    autoquant, tmp_path, monkeypatch
):
    model, text = save_searchable("llama", tmp_path / "model"), save_text(tmp_path / "text")
    done = []

    def seen(name):
        real = getattr(session, name)

        def call(*given, **named):
            done.append(name)
            return real(*given, **named)

        monkeypatch.setattr(session, name, call)

    for name in ("make_splits", "return_freed_memory", "make_session"):
        seen(name)
    flags = ("--calibration", text, "--search-tokens", 512, "--sequence-length", 32)
    result = autoquant("probe", model, *flags, "--effort", "fast", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert done == ["make_splits", "return_freed_memory", "make_session"]


def test_loading_goes_by_the_same_work(autoquant, tmp_path, monkeypatch):
    model, text = save_searchable("llama", tmp_path / "model"), save_text(tmp_path / "text")
    seen, choose = [], placement.choose

    def spy(sizes, *given, **named):
        seen.append(sizes)
        return choose(sizes, *given, **named)

    monkeypatch.setattr(placement, "choose", spy)
    flags = ("--calibration", text, *TOKEN_FLAGS, "--effort", "fast", "--device", "cpu")
    run = (
        "--budget-bpe",
        9,
        "--trials",
        0,
        "--no-mlflow",
        "--no-export",
        "--out",
        tmp_path / "run",
    )
    result = autoquant("search", model, *flags, "--probe", "gradient", *run)
    assert result.exit_code == 0, result.stderr
    (loaded,) = seen
    beside = forecast(autoquant, model, *flags, "--host-memory", "4GiB")["device_bytes"]
    beside -= loaded.all + 2 * loaded.work + placement.WORK_BYTES
    assert loaded.work > COMPARED_BYTES
    assert 0 < beside < loaded.work // 10, "codes and states of a small model"


def test_what_does_not_fit_ends_with_what_would(autoquant, tmp_path):
    model = save_model("llama", tmp_path / "model")
    result = autoquant("plan", model, "--device", "cpu", "--host-memory", "64MiB", "--forecast")
    assert result.exit_code == 6
    assert result.stdout == ""
    assert "--weights disk takes least" in result.stderr


@pytest.fixture
def with_gpus(monkeypatch):
    """Lets this machine seem to have some, of which memory has to be allowed."""

    def put(count):
        monkeypatch.setattr(forecasting, "choose_device", lambda device: torch.device("cuda"))
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)

    return put


def test_sharded_weights_count_on_all_gpus_of_the_machine(autoquant, tmp_path, with_gpus):
    with_gpus(8)
    model = save_model("llama", tmp_path / "model", num_hidden_layers=8)
    flags = (model, "--weights", "sharded", "--device-memory", "2GiB", "--host-memory", "2GiB")
    found = forecast(autoquant, *flags)
    assert (found["weights"], found["gpus"]) == ("sharded", 8)
    blocks = 8 * found["largest_block_bytes"]
    passes = sum(part["passes"] for part in found["passes"].values())
    assert found["brought_bytes"] == passes * (blocks - blocks // 8)
    shown = autoquant("plan", *flags, "--forecast").stdout
    assert "of each of 8 GPUs" in shown
    assert "from all of them" in shown


@pytest.mark.parametrize(
    ("processes", "weights", "gpus"), [(1, "auto", 1), (4, "auto", 4), (4, "sharded", 4)]
)
def test_gpus_are_those_of_the_processes_that_were_started(
    monkeypatch, with_gpus, processes, weights, gpus
):
    with_gpus(8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert forecasting._gpus(torch.device("cuda"), Weights(weights)).count == gpus


def test_sharded_weights_are_refused_where_there_are_no_gpus_for_them(
    autoquant, tmp_path, with_gpus
):
    model = save_model("llama", tmp_path / "model")
    flags = ("plan", model, "--forecast", "--weights", "sharded")
    result = autoquant(*flags, "--device", "cpu")
    assert result.exit_code == 2
    assert "several GPUs of a machine, and cpu is no GPU" in result.stderr
    with_gpus(1)
    result = autoquant(*flags)
    assert result.exit_code == 2
    assert "this one has one" in result.stderr
    assert "torchrun" in result.stderr


def test_no_weight_is_read_and_none_is_needed(autoquant, tmp_path):
    model = save_model("llama", tmp_path / "model")
    whole = forecast(autoquant, model, "--device", "cpu")
    (model / "model.safetensors").unlink()
    assert forecast(autoquant, model, "--device", "cpu") == whole


def test_without_the_flag_nothing_is_said(autoquant, tmp_path):
    model = save_model("llama", tmp_path / "model")
    assert json.loads(autoquant("plan", model, "--format", "json").stdout)["forecast"] is None


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 8])
@pytest.mark.parametrize(
    ("probe", "effort"),
    [("screened", "fast"), ("gradient", "fast"), ("exact", "fast"), ("screened", "default")],
)
def test_passes_are_those_that_a_search_then_counts(autoquant, tmp_path, probe, effort, at_once):
    """Where what is measured decides, at most those."""
    model = save_searchable("minimax_m2", tmp_path / "model", num_hidden_layers=3)
    text, run = save_text(tmp_path / "text"), tmp_path / "run"
    flags = (
        *("--calibration", text, *TOKEN_FLAGS, "--effort", effort, "--device", "cpu"),
        *("--weights", "disk", "--host-memory", "1GiB", "--probe", probe),
        *("--trials", 12, "--trials-at-once", at_once),
    )
    found = forecast(autoquant, model, *flags)
    done = autoquant(
        *("search", model, "--budget-bpe", 9, *flags, "--no-mlflow", "--no-export", "--out", run)
    )
    assert done.exit_code == 0, done.stderr
    work = {stage["stage"]: stage for stage in read_records(run, WORK)}
    assert found["passes"].keys() == work.keys()
    for name, part in found["passes"].items():
        taken = work[name]["passes"]
        assert 0 < taken <= part["passes"] if part["is_most"] else taken == part["passes"], name
    assert found["passes"]["refine"]["passes"] < 12, "fewer than trials, one at a time or not"
    brought = sum(stage["bytes_brought"] for stage in work.values())
    # Most is taken where every swap is the best so far.
    assert brought <= found["brought_bytes"] < 3 * brought


def test_a_search_without_trials_passes_over_nothing_to_refine(autoquant, tmp_path):
    model = save_model("llama", tmp_path / "model")
    flags = (model, "--device", "cpu", "--weights", "disk", "--host-memory", "1GiB")
    found = forecast(autoquant, *flags, "--trials", 0)["passes"]
    assert found["refine"]["passes"] == 0 < found["solve"]["passes"]


def test_passes_are_more_where_states_of_all_batches_do_not_fit(autoquant, tmp_path):
    model = save_model("llama", tmp_path / "model", hidden_size=256)
    flags = (model, "--device", "cpu", "--weights", "disk", "--host-memory")
    more = forecast(autoquant, *flags, "900MiB", "--calibration-tokens", 2**20)
    assert more["passes"]["calibrate"] == {"passes": 2, "is_most": False}
    enough = forecast(autoquant, *flags, "3GiB", "--calibration-tokens", 2**20)
    assert enough["passes"]["calibrate"] == {"passes": 1, "is_most": False}
    assert enough["brought_bytes"] < more["brought_bytes"]
