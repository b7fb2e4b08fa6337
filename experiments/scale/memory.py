"""The forecast of memory beside the peak of a search on a CPU, for weights in memory and on disk.

Each search is a process of its own. Its peak is what the kernel says of its resident memory.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.common import record

TOKENS = (
    *("--calibration", "stdlib", "--calibration-tokens", "1024", "--search-tokens", "2048"),
    *("--report-tokens", "1024", "--sequence-length", "256", "--batch-tokens", "1024"),
)
SEARCH = ("--effort", "fast", "--trials", "2", "--device", "cpu")


def beside(model: Path, weights: str, work: Path, bpe: float) -> dict[str, Any]:
    """Forecast and peak of one search, bytes."""
    flags = [str(model), *TOKENS, *SEARCH, "--weights", weights]
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
    parser.add_argument("model", type=Path, help="as make.py writes it")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--budget-bpe", type=float, default=7.5)
    parser.add_argument("--out", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    model, work, bpe = arguments.model, arguments.work, arguments.budget_bpe
    found = [beside(model, weights, work, bpe) for weights in ("resident", "disk")]
    record.show({"searches": found}, arguments.out)


if __name__ == "__main__":
    main()
