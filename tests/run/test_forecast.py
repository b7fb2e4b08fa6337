"""`autoquant plan --forecast`: where weights will be, by the sizes that loading goes by, and how
often they will be read.
"""

import json

import pytest
import torch
from searchable import TOKEN_FLAGS, save_searchable, save_text
from tiny_models import save_model

from autoquant.codes.held import Weights
from autoquant.model.loading import load_model, sizes_of
from autoquant.model.streaming import placement
from autoquant.run.machines import forecast as forecasting
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
    found = forecast(autoquant, model, "--device", "cpu", "--host-memory", "4GiB")
    assert (found["weights"], found["device"]) == ("resident", "cpu")
    needed = int(found["weight_bytes"] * 1.1) + placement.WORK_BYTES
    assert found["device_bytes"] > needed + 2 * found["weight_bytes"], "with codes that are kept"
    assert found["device_bytes"] <= needed + 9 * found["weight_bytes"]
    between = (needed + placement.WORK_BYTES) // 2
    less = forecast(autoquant, model, "--device", "cpu", "--host-memory", between)
    assert less["weights"] == "disk"
    assert less["device_bytes"] <= between
    assert less["weight_bytes"] == found["weight_bytes"] >= 40 * found["largest_block_bytes"]
    shown = autoquant("plan", model, "--device", "cpu", "--host-memory", between, "--forecast")
    assert "of cpu: blocks of 0.00 GB from the disk" in shown.stdout


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
@pytest.mark.parametrize("probe", ["screened", "gradient", "exact"])
def test_passes_are_those_that_a_search_then_counts(autoquant, tmp_path, probe, at_once):
    """Where what is measured decides, at most those."""
    model = save_searchable("minimax_m2", tmp_path / "model", num_hidden_layers=3)
    text, run = save_text(tmp_path / "text"), tmp_path / "run"
    flags = (
        *("--calibration", text, *TOKEN_FLAGS, "--effort", "fast", "--device", "cpu"),
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
    more = forecast(autoquant, *flags, "580MiB", "--calibration-tokens", 2**20)
    assert more["passes"]["calibrate"] == {"passes": 2, "is_most": False}
    enough = forecast(autoquant, *flags, "2GiB", "--calibration-tokens", 2**20)
    assert enough["passes"]["calibrate"] == {"passes": 1, "is_most": False}
    assert enough["brought_bytes"] < more["brought_bytes"]
