"""What recording in MLflow costs a search: what it waits for, and the CPU time of both threads.

Usage: python experiments/tracking/run.py [--results FILE] SEARCH-FLAGS...

The search is the command line's own, `autoquant search SEARCH-FLAGS`.
"""

import argparse
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoquant.cli import cli
from autoquant.environment import git_commit, machine, package_versions
from autoquant.tracking import recorder, store

CALLS = (
    (store, "_open"),
    *((recorder.Recorder, n) for n in ("dataset", "trial", "result", "close")),
)
"""What the search waits for."""

SENDER = "sender"


def timed(owner: Any, name: str, spent: dict[str, list[tuple[float, float]]]) -> None:
    """Let `owner.name` note the wall clock and CPU seconds of each call."""
    call: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            spent[name].append((time.perf_counter() - wall, time.thread_time() - cpu))

    setattr(owner, name, wrapper)


def timed_sender(spent: dict[str, list[tuple[float, float]]]) -> None:
    """Let the CPU seconds of each record that the tracker's thread sends be noted."""
    succeeds = recorder.Recorder._succeeds

    def wrapper(self: recorder.Recorder, action: Callable[[], None]) -> bool:
        cpu = time.thread_time()
        try:
            return succeeds(self, action)
        finally:
            if threading.current_thread() is not threading.main_thread():
                spent[SENDER].append((0.0, time.thread_time() - cpu))

    recorder.Recorder._succeeds = wrapper  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.json"))
    arguments, flags = parser.parse_known_args()
    spent: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for owner, name in CALLS:
        timed(owner, name, spent)
    timed_sender(spent)
    sys.argv = ["autoquant", "search", *flags]  # what an interrupted search says to type
    wall, cpu = time.perf_counter(), time.process_time()
    cli(sys.argv[1:], standalone_mode=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rows = {
        name: {
            "calls": len(times),
            "wall_seconds": sum(time for time, _ in times),
            "cpu_seconds": sum(time for _, time in times),
        }
        for name, times in spent.items()
    }
    result = {
        "command": ["autoquant", "search", *flags],
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "share_of_wall": sum(row["wall_seconds"] for row in rows.values()) / wall,
        "share_of_cpu": sum(row["cpu_seconds"] for row in rows.values()) / cpu,
        "calls": rows,
        "commit": git_commit(),
        "machine": machine(),
        "packages": package_versions(),
    }
    arguments.results.write_text(json.dumps(result, indent=2) + "\n")
    for share in ("share_of_wall", "share_of_cpu"):
        print(f"{share}: {result[share]:.2%}", file=sys.stderr)


if __name__ == "__main__":
    main()
