"""One search by 1, 2, 4, ... processes of a machine, one for each GPU: time, memory, result.

    python -m experiments.scale.ranks MODEL --work FOLDER --ranks 1 2 --out FILE

`torchrun` starts the processes. What one process takes of a stage is held against what N of them
take: the efficiency is time of one / (N * time of N).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import autoquant
from autoquant.files import to_json, write_atomic
from autoquant.store.run_directory import WORK, read_records
from experiments.scale.gpu import LEFT_OUT, compared

SHARED = ("probe", "refine")
"""The stages whose work is dealt to the processes and grows with a model."""


def search(arguments: argparse.Namespace) -> dict[str, Any]:
    """In every process: the search, and the peaks of all devices."""
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
        weights=arguments.weights,
        mlflow=False,
        export=False,
        out=arguments.work / f"{arguments.weights}-{distributed.get_world_size()}",
    )
    seconds = time.monotonic() - started
    peaks: list[int | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(peaks, _peak(run) if torch.cuda.is_available() else None)
    result = run.result or {}
    distributed.destroy_process_group()
    return {
        "ranks": len(peaks),
        "peak_bytes": peaks,
        "total_seconds": seconds,
        "seconds": result["seconds"],
        "result": {name: value for name, value in result.items() if name not in LEFT_OUT},
    }


def _peak(run: autoquant.Run) -> int:
    """Of this process's device; process 0 begins to count anew with each stage."""
    stages = read_records(run.path, WORK) if os.environ["RANK"] == "0" else ()
    last = torch.cuda.max_memory_allocated()
    return max((own["gpu_peak_bytes"] for own in stages), default=last)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """A search by each number of processes, the smallest first."""
    found: list[dict[str, Any]] = []
    for ranks in sorted(arguments.ranks):
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        words += ["-m", "experiments.scale.ranks"]
        words += [str(arguments.model), "--work", str(arguments.work), "--one"]
        for name in ("weights", "batch_tokens", "batches", "trials", "budget_bpe"):
            words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    results = [each.pop("result") for each in found]
    for each in found:
        each["efficiency"] = {
            stage: found[0]["ranks"]
            * found[0]["seconds"][stage]
            / (each["ranks"] * each["seconds"][stage])
            for stage in SHARED
        }
    names = ("weights", "batch_tokens", "batches", "trials")
    settings = {name: getattr(arguments, name) for name in names}
    return compared(arguments.model, results) | {"settings": settings, "searches": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="as make.py writes it")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--weights", choices=["resident", "host", "disk"], default="resident")
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
    text = to_json(compare(arguments), indent=2)
    if arguments.out is not None:
        write_atomic(arguments.out, text)
    print(text)


if __name__ == "__main__":
    main()
