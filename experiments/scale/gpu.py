"""One search with its weights on the device, on the host and on the disk: time, memory beside its
forecast, result.

Each runs in a process of its own, so that the peak of one says nothing of another.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import autoquant
from autoquant.run.config import PlanConfig
from autoquant.run.machines.forecast import Forecast
from autoquant.run.opening import open_plan
from autoquant.store.run_directory import WORK, read_records
from experiments.common import record
from experiments.common.processes import figures_of

SETTINGS: dict[str, Any] = {
    "calibration": "stdlib",
    "calibration_tokens": 4_096,
    "search_tokens": 8_192,
    "report_tokens": 4_096,
    "sequence_length": 512,
    "effort": "fast",
    "trials": 8,
    "trials_at_once": 8,
}
LEFT_OUT = ("seconds", "command", "checkpoint", "stages")
"""Of a result: what holds times, and names of folders."""


def search(model: Path, out: Path, weights: Any, allowed: int | None, bpe: float) -> dict[str, Any]:
    """Seconds by stage with passes and bytes, peak of the device beside its forecast, the result
    without times.
    """
    settings = SETTINGS | {"weights": weights, "device_memory": allowed}
    forecast = forecast_bytes(model, settings)
    started = time.monotonic()
    run = autoquant.search(model, budget_bpe=bpe, mlflow=False, export=False, out=out, **settings)
    result = run.result or {}
    stages, gpu = read_records(run.path, WORK), torch.cuda.is_available()
    peak = max(own["gpu_peak_bytes"] for own in stages) if gpu else None
    return {
        "weights": weights,
        "allowed_bytes": allowed,
        "forecast_bytes": forecast,
        "peak_bytes": peak,
        "peak_over_forecast": peak and peak / forecast,
        "peak_over_allowed": peak and allowed and peak / allowed,
        "total_seconds": time.monotonic() - started,
        "stages": stages,
        "result": {name: value for name, value in result.items() if name not in LEFT_OUT},
    }


def forecast_bytes(model: Path, settings: Mapping[str, Any]) -> int:
    """Of the device's memory, as `autoquant plan --forecast` says it."""
    config = PlanConfig.of({"model": str(model), **settings})
    return Forecast.of(config, open_plan(config)).device_bytes


def compare(model: Path, work: Path, allowed: int, bpe: float) -> dict[str, Any]:
    """All three, and whether their results are the same."""
    found = []
    for weights in ("resident", "host", "disk"):
        words = [sys.executable, "-m", "experiments.scale.gpu", str(model), "--work", str(work)]
        words += ["--one", weights, "--budget-bpe", str(bpe)]
        words += [] if weights == "resident" else ["--allowed", str(allowed)]
        found.append(figures_of(words))
    results = [each.pop("result") for each in found]
    return compared(model, results) | {"searches": found}


def compared(model: Path, results: Sequence[Any]) -> dict[str, Any]:
    """Where searches of a model ran, and whether all came to the same."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "model_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "same_result": all(result == results[0] for result in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="as make.py writes it")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--allowed", type=int, help="bytes of the device for streamed weights")
    parser.add_argument("--budget-bpe", type=float, default=5.5)
    parser.add_argument("--one", help="run this search alone")
    parser.add_argument("--out", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    if arguments.one:
        run = arguments.work / arguments.one
        found = search(arguments.model, run, arguments.one, arguments.allowed, arguments.budget_bpe)
        print(json.dumps(found))
        return
    figures = compare(arguments.model, arguments.work, arguments.allowed, arguments.budget_bpe)
    record.show(figures, arguments.out)


if __name__ == "__main__":
    main()
