"""How long the report of a large run takes, and how large it is.

Usage: python -m experiments.report_scale.run RUN [--results FILE]

RUN is any finished run directory; a copy of it is grown to 600 groups and 500 trials.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoquant.environment import git_commit, machine, package_versions
from autoquant.report.html import write_report
from autoquant.report.record import RunRecord
from experiments.report_scale.grow import grow

LAYERS, GROUPS, TRIALS = 50, 600, 500
REPEATS = 7


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def timed(action: Callable[[], object]) -> dict[str, float]:
    """Medians and least of the repeats, wall clock and CPU."""
    rows = []
    for _ in range(REPEATS):
        wall, cpu = time.perf_counter(), cpu_seconds()
        action()
        rows.append((time.perf_counter() - wall, cpu_seconds() - cpu))
    walls, cpus = zip(*rows, strict=True)
    return {
        "wall_median": statistics.median(walls),
        "wall_least": min(walls),
        "cpu_median": statistics.median(cpus),
        "cpu_least": min(cpus),
    }


def measure(run: Path) -> dict[str, Any]:
    """Seconds of the generation alone, in a process that has drawn before, and of the command."""
    command = [sys.executable, "-m", "autoquant", "report", str(run)]
    write_report(RunRecord.read(run))
    record = RunRecord.read(run)
    return {
        "groups": len(record.groups),
        "trials": len(record.trials),
        "bytes": (run / "report.html").stat().st_size,
        "generation": timed(lambda: write_report(RunRecord.read(run))),
        "command": timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "large"
        kept = shutil.ignore_patterns("checkpoint", "interactions")
        shutil.copytree(arguments.run, run, ignore=kept)
        grow(run, layers=LAYERS, groups=GROUPS, trials=TRIALS)
        found = measure(run)
    found |= {"commit": git_commit(), "machine": machine(), "packages": package_versions()}
    arguments.results.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({name: found[name] for name in ("generation", "command", "bytes")}))


if __name__ == "__main__":
    main()
