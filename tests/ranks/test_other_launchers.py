"""`autoquant.search` in processes that somebody else has put together."""

import json
import os
import sys

import pytest
import torch
from searchable import save_searchable, save_text

import autoquant

pytestmark = pytest.mark.slow

TOKENS = {
    "calibration_tokens": 256,
    "search_tokens": 256,
    "report_tokens": 512,
    "sequence_length": 32,
    "batch_tokens": 128,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    save_searchable("llama", folder / "model")
    save_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return search(folder, folder / "alone")


def search(folder, run):
    found = autoquant.search(
        folder / "model",
        budget_bpe=9.0,
        calibration=str(folder / "text"),
        **TOKENS,
        trials=2,
        mlflow=False,
        export=False,
        out=run,
    )
    return measured(found.result)


def measured(result):
    """What does not differ from run to run: no times, no folders."""
    stages = [{**row, "seconds": 0.0} for row in result["stages"]]
    left_out = ("seconds", "command", "checksum")
    kept = {name: value for name, value in result.items() if name not in left_out}
    return json.dumps({**kept, "stages": stages}, sort_keys=True)


def in_a_process(rank, rendezvous, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    found = search(folder, folder / "spawned")
    (folder / f"spawned-{rank}.json").write_text(found)
    torch.distributed.destroy_process_group()


def test_processes_of_torch_multiprocessing(folder, alone, tmp_path):
    torch.multiprocessing.spawn(in_a_process, (str(tmp_path / "rendezvous"), folder), nprocs=2)
    for rank in (0, 1):
        assert (folder / f"spawned-{rank}.json").read_text() == alone


def test_workers_of_ray_train(folder, alone, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.train.torch")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    def worker(config):
        rank = torch.distributed.get_rank()
        found = search(config["folder"], config["folder"] / "ray")
        (config["folder"] / f"ray-{rank}.json").write_text(found)

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # nothing is reachable from outside
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}},
    )
    try:
        TorchTrainer(
            worker,
            train_loop_config={"folder": folder},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=str(tmp_path / "ray")),
        ).fit()
    finally:
        ray.shutdown()
    for rank in (0, 1):
        assert (folder / f"ray-{rank}.json").read_text() == alone
