"""The forecast of memory beside the peak of a search on a CPU, for weights in memory and on disk.

Each search is a process of its own. Its peak is what the kernel says of its resident memory.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common import record

TOKENS = (
    *("--calibration-tokens", "1024", "--search-tokens", "2048", "--report-tokens", "1024"),
    *("--sequence-length", "256", "--batch-tokens", "1024"),
)
SEARCH = ("--trials", "2", "--device", "cpu")


def beside(flags: Sequence[str], weights: str, work: Path, bpe: float) -> dict[str, Any]:
    """Forecast and peak of one search, bytes."""
    flags = [*flags, *SEARCH, "--weights", weights]
    words = [sys.executable, "-m", "autoquant", "plan", *flags, "--forecast", "--format", "json"]
    said = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)["forecast"]
    words = [sys.executable, "-m", "autoquant", "search", *flags, "--budget-bpe", str(bpe)]
    words += ["--no-mlflow", "--no-export", "--out", str(work / weights)]
    process = subprocess.Popen(words)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    peak = usage.ru_maxrss * 1024
    return {
        "weights": weights,
        "weight_bytes": said["weight_bytes"],
        "largest_block_bytes": said["largest_block_bytes"],
        "forecast_bytes": said["device_bytes"],
        "peak_bytes": peak,
        "peak_over_forecast": peak / said["device_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="the bundled one by default")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--budget-bpe", type=float, default=7.5)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--calibration", default="stdlib", help="text")
    parser.add_argument("--weights", nargs="+", default=["resident", "disk"])
    parser.add_argument("--all-tokens", action="store_true", help="as many as a search by default")
    parser.add_argument("--out", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    model = () if arguments.model is None else (str(arguments.model),)
    flags = [*model, "--calibration", arguments.calibration, "--effort", arguments.effort]
    flags += () if arguments.all_tokens else TOKENS
    bpe = arguments.budget_bpe
    found = [beside(flags, weights, arguments.work, bpe) for weights in arguments.weights]
    record.show({"searches": found}, arguments.out)


if __name__ == "__main__":
    main()
