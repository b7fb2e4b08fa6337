"""The long run: kills of every command, then mutations of every file, and their figures as a table.

    python tests/robustness/long_run.py build/robustness --kills 1000 --mutations 10000

What was done before in the same folder is not done again. Ends with 1 if anything was wrong.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KILLED = ("KILL", "TEAR")


def main() -> None:
    """Run both harnesses, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="for the figures of each harness")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--mutations", type=int, default=10_000)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    states = {}
    for name, option, count in (
        ("kills", "--kills", given.kills),
        ("fuzz", "--mutations", given.mutations),
    ):
        states[name] = given.folder / f"{name}.json"
        command = [sys.executable, str(HERE / f"{name}.py"), option, str(count)]
        command += ["--state", str(states[name])]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    kills, fuzz = (json.loads(state.read_text()) for state in states.values())
    print(table(kills, fuzz))
    failures = [*kills["failures"], *fuzz["failures"]]
    for failure in failures:
        print(f"- {failure}")
    raise SystemExit(bool(failures))


def table(kills: dict[str, Any], fuzz: dict[str, Any]) -> str:
    """Markdown: a row for each command that was cut short and for each file that was mutated."""
    rows: dict[str, Counter[str]] = {}
    for case, count in kills["cases"].items():
        command, _, action = case.rpartition(": ")
        rows.setdefault(command, Counter())["killed" if action in KILLED else "refused"] += count
    lines = ["| command | killed | refused a write |", "|---|---:|---:|"]
    lines += [f"| {name} | {own['killed']} | {own['refused']} |" for name, own in rows.items()]
    total = sum(rows.values(), Counter())
    lines += [f"| together | {total['killed']} | {total['refused']} |", ""]
    lines += ["| file | mutations |", "|---|---:|"]
    lines += [f"| `{name}` | {count} |" for name, count in fuzz["mutations"].items()]
    lines += [f"| together | {sum(fuzz['mutations'].values())} |", ""]
    codes = ", ".join(f"{count} with {code}" for code, count in sorted(fuzz["codes"].items()))
    lines += [
        f"Commands on mutated files ended {codes}.",
        f"Wrong: {len(kills['failures'])} after kills and refusals, {len(fuzz['failures'])} after "
        "mutations.",
        f"The longest command on a mutated file took {fuzz['seconds']:.1f} s of processor time, "
        f"the largest {fuzz['megabytes']} MB.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
