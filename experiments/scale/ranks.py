"""One search by 1, 2, 4, ... processes of a machine, one for each GPU: time, memory, result.

    python -m experiments.scale.ranks MODEL --work FOLDER --ranks 1 2 --out FILE
    python -m experiments.scale.ranks MODEL --work FOLDER --ranks 2 --out FILE \
        --weights resident sharded host --allowed 10000000000

`torchrun` starts the processes. What the first search takes of a stage, of one process if there is
one, is held against what N of them take: the efficiency is time of one / (N * time of N).
"""

import argparse
import json
import os
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import autoquant
from autoquant.model.memory import DeviceMemory
from autoquant.store.run_directory import WORK, read_records
from experiments.common import record
from experiments.common.processes import figures_of
from experiments.scale.gpu import LEFT_OUT, compared

SHARED = ("probe", "refine")
"""The stages whose work is dealt to the processes and grows with a model."""


def search(arguments: argparse.Namespace) -> dict[str, Any]:
    """In every process: the search, and the peaks of all devices."""
    (weights,) = arguments.weights
    distributed.init_process_group("gloo")
    started = time.monotonic()
    run = autoquant.search(
        arguments.model,
        budget_bpe=arguments.budget_bpe,
        budget_scope="searched",
        calibration="stdlib",
        calibration_tokens=arguments.batch_tokens * 4,
        search_tokens=arguments.batch_tokens * arguments.batches,
        report_tokens=arguments.batch_tokens * 4,
        sequence_length=512,
        batch_tokens=arguments.batch_tokens,
        effort="fast",
        trials=arguments.trials,
        trials_at_once=8,
        weights=weights,
        device_memory=None if weights == "resident" else arguments.allowed,
        mlflow=False,
        export=False,
        out=arguments.work / f"{weights}-{distributed.get_world_size()}",
    )
    seconds = time.monotonic() - started
    peaks: list[int | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(peaks, _peak(run) if torch.cuda.is_available() else None)
    result = run.result or {}
    distributed.destroy_process_group()
    return {
        "ranks": len(peaks),
        "weights": weights,
        "peak_bytes": peaks,
        "brought_bytes": sum(stage["bytes_brought"] for stage in read_records(run.path, WORK)),
        "total_seconds": seconds,
        "seconds": result["seconds"],
        "result": {name: value for name, value in result.items() if name not in LEFT_OUT},
    }


def _peak(run: autoquant.Run) -> int:
    """Of this process's device; process 0 begins to count anew with each stage."""
    stages = read_records(run.path, WORK) if os.environ["RANK"] == "0" else ()
    last = DeviceMemory().peak()
    return max((own["gpu_peak_bytes"] for own in stages), default=last)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """A search by each number of processes, the smallest first, with weights in each place."""
    found: list[dict[str, Any]] = []
    for ranks, weights in product(sorted(arguments.ranks), arguments.weights):
        if ranks == 1 and weights == "sharded":
            continue
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        words += ["-m", "experiments.scale.ranks"]
        words += [str(arguments.model), "--work", str(arguments.work), "--one"]
        words += ["--weights", weights]
        words += [] if arguments.allowed is None else ["--allowed", str(arguments.allowed)]
        for name in ("batch_tokens", "batches", "trials", "budget_bpe"):
            words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        found.append(figures_of(words))
    results = [each.pop("result") for each in found]
    for each in found:
        each["efficiency"] = {
            stage: found[0]["ranks"]
            * found[0]["seconds"][stage]
            / (each["ranks"] * each["seconds"][stage])
            for stage in SHARED
        }
    names = ("allowed", "batch_tokens", "batches", "trials")
    settings = {name: getattr(arguments, name) for name in names}
    return compared(arguments.model, results) | {"settings": settings, "searches": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="as make.py writes it")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    places = ["resident", "sharded", "host", "disk"]
    parser.add_argument("--weights", choices=places, nargs="+", default=["resident"])
    parser.add_argument("--allowed", type=int, help="bytes of a device for streamed weights")
    parser.add_argument("--batch-tokens", type=int, default=4_096)
    parser.add_argument("--batches", type=int, default=8, help="of search tokens")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--budget-bpe", type=float, default=5.5)
    parser.add_argument("--one", action="store_true", help="be one of the processes")
    parser.add_argument("--out", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    if arguments.one:
        found = search(arguments)
        if os.environ["RANK"] == "0":
            print(json.dumps(found))
        return
    record.show(compare(arguments), arguments.out)


if __name__ == "__main__":
    main()
