"""The time that `plan --measure` forecasts, held against searches of the same settings.

On a CPU both are processor seconds of one thread, since other programs share the machine; on a GPU
they are seconds. A forecast and its search run in processes of their own.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import autoquant
from autoquant.run.config import PlanConfig
from autoquant.run.machines.forecast import Forecast
from autoquant.run.machines.timing import Timing
from autoquant.run.opening import open_plan
from autoquant.store.run_directory import WORK, read_records
from experiments.common import record
from experiments.common.processes import figures_of

TOKENS = {"calibration_tokens": 4_096, "search_tokens": 8_192, "report_tokens": 8_192}


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the forecast and the search have in common."""
    return {
        "model": None if arguments.model is None else str(arguments.model),
        "budget_bpe": arguments.budget_bpe,
        "calibration": "stdlib",
        "sequence_length": arguments.sequence_length,
        "batch_tokens": arguments.batch_tokens,
        "weights": arguments.weights,
        "device_memory": arguments.device_memory,
        "effort": arguments.effort,
        "trials": arguments.trials,
        **{name: tokens // arguments.fewer for name, tokens in TOKENS.items()},
    }


def forecast(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `plan --measure` says, with its parts."""
    config = PlanConfig(**settings, measure=True)
    plan = open_plan(config)
    clock = time.monotonic if torch.cuda.is_available() else time.process_time
    return Timing.of(config, plan, Forecast.of(config, plan), clock).to_dict()


def search(settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Seconds and passes of each stage of a search."""
    autoquant.search(**settings, mlflow=False, export=False, out=out)
    unit = "seconds" if torch.cuda.is_available() else "cpu_seconds"
    stages = read_records(out, WORK)
    return {
        "seconds": {record["stage"]: record[unit] for record in stages},
        "passes": {record["stage"]: record["passes"] for record in stages},
    }


def compared(expected: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Both, part by part, and the ratio of the parts that are in both."""
    taken = found["seconds"]
    both = [name for name in taken if name in expected["seconds"]]
    of_forecast = {name: expected["seconds"][name] for name in both}
    total = sum(taken[name] for name in both)
    return {
        "unit": "seconds" if torch.cuda.is_available() else "processor seconds, one thread",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "forecast": of_forecast,
        "taken": {name: taken[name] for name in both},
        "passes": found["passes"],
        "ratio": sum(of_forecast.values()) / total,
        "measured": expected["measured"],
        "measurement_seconds": expected["took"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="the bundled one by default")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--device-memory")
    parser.add_argument("--budget-bpe", type=float, default=5.5)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=4_096)
    parser.add_argument("--fewer", type=int, default=1, help="divides the tokens of every split")
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--part", choices=("forecast", "search"), help="of a process of its own")
    arguments = parser.parse_args()
    settings = settings_of(arguments)
    if arguments.part == "forecast":
        print(json.dumps(forecast(settings)))
        return
    if arguments.part == "search":
        with tempfile.TemporaryDirectory() as work:
            print(json.dumps(search(settings, Path(work) / "run")))
        return
    found = []
    for part in ("forecast", "search"):
        words = [sys.executable, "-m", "experiments.scale.forecast", *sys.argv[1:], "--part", part]
        found.append(figures_of(words))
    name = "bundled" if arguments.model is None else arguments.model.name
    figures = {"settings": settings | {"model": name}} | compared(*found)
    record.show(figures, arguments.out)


if __name__ == "__main__":
    main()
