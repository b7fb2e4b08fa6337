"""Commands on mutated files: none fails by accident, hangs, or takes what its libraries refuse.

    python tests/robustness/fuzz.py --mutations 10000 --state fuzz.json

Mutations are drawn by hypothesis, the same for the same seed. Each is a file of a model, a
checkpoint, a run or settings; commands read it in forks of this process with limits on time and
memory. Figures are in the state file after every turn of a file, from which a run goes on.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]

from events import Ended, call_in_fork, in_fork, warm  # noqa: E402
from figures import Figures  # noqa: E402
from fuzzed import Fuzzed, make_fuzzed  # noqa: E402

LONGEST = 10.0
"""Seconds of processor time that a command may take."""
LARGEST = 2**31
"""Bytes that a command may add to the memory of this process."""
PATIENCE = 120.0
"""Seconds until a command is taken for one that waits for ever."""
REFUSED = (2, 3, 4, 5)
"""Exit codes of commands that say what is wrong."""
A_TURN = 20
"""Mutations of one file before the next file has its turn."""


@dataclass(slots=True)
class Found(Figures):
    """What a run of the fuzzer has found."""

    mutations: dict[str, int] = field(default_factory=dict)
    """By file."""
    codes: dict[str, int] = field(default_factory=dict)
    """Commands by exit code."""
    turns: int = 0


def drawn(strategy: st.SearchStrategy[bytes], count: int, number: int) -> list[bytes]:
    """`count` examples at most, different ones, the same for the same number."""
    found: dict[bytes, None] = {}

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(content: bytes) -> None:
        found[content] = None

    collect()
    return list(found)


def copied(fuzzed: Fuzzed, content: bytes, folder: Path) -> Path:
    """A copy of the folder with another content of the file; what is not changed is linked."""
    shutil.copytree(fuzzed.folder, folder, copy_function=os.link)
    for path in (folder / "run").iterdir():  # which commands write to
        if path.is_file():
            text = path.read_bytes()
            path.unlink()
            path.write_bytes(text)
    (folder / fuzzed.file).unlink()
    (folder / fuzzed.file).write_bytes(content)
    return folder


def wrong(ended: Ended) -> str | None:
    """What a command did that none may do, whatever it reads."""
    if ended.code not in (0, *REFUSED):
        return f"ended with {ended.code}"
    if ended.seconds > LONGEST:
        return f"took {ended.seconds:.1f} s"
    lines = ended.stderr.splitlines()
    says = [line for line in lines if line.startswith("error: ")]
    if ended.code and (len(says) != 1 or not lines[-1].startswith("  fix: ")):
        return "says other than one line and one way out"
    return "prints a traceback" if "Traceback (most recent call last)" in lines else None


def check(fuzzed: Fuzzed, content: bytes, folder: Path, found: Found) -> list[str]:
    """Run the commands on the mutated file; what was wrong."""
    problems = []
    for command in fuzzed.commands:
        work = copied(fuzzed, content, folder / "work")
        ended = in_fork(command, work, patience=PATIENCE, memory=LARGEST)
        found.codes[str(ended.code)] = found.codes.get(str(ended.code), 0) + 1
        found.add(ended)
        reason = wrong(ended)
        if reason is None and ended.code == 0 and fuzzed.accepts and command[0] != "plan":
            reader = call_in_fork(partial(fuzzed.accepts, work), work, patience=PATIENCE)
            if reader.code != 0:
                reason = f"takes what its library refuses: {reader.stderr[-300:]}"
        if reason is not None:
            problems.append(f"{command[0]}: {reason}: {ended.stderr[-500:]}")
        shutil.rmtree(work)
    return problems


def run(mutations: int, state: Path | None = None, only: str | None = None) -> Found:
    """Mutate every file in turn, `mutations` times in all."""
    found = Found.read(state)
    kept = None if state is None else state.with_suffix(".failures")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [f for f in make_fuzzed(folder, _require_done) if only in (None, f.name)]
        while sum(found.mutations.values()) < mutations:
            fuzzed = files[found.turns % len(files)]
            left = mutations - sum(found.mutations.values())
            contents = drawn(fuzzed.mutated, min(A_TURN, left) + 1, found.turns)
            for content in contents[: min(A_TURN, left)]:
                if content == fuzzed.sound:
                    continue
                found.mutations[fuzzed.name] = found.mutations.get(fuzzed.name, 0) + 1
                for problem in check(fuzzed, content, folder, found):
                    found.failures.append(f"{fuzzed.name} ({len(found.failures)}): {problem}")
                    if kept is not None:
                        kept.mkdir(exist_ok=True)
                        (kept / f"{len(found.failures) - 1}").write_bytes(content)
            found.turns += 1
            found.write(state)
    return found


def _require_done(arguments: Sequence[str], folder: Path) -> None:
    ended = in_fork(arguments, folder)
    if ended.code != 0:
        raise RuntimeError(f"{' '.join(arguments)}: {ended.stderr}")


def main() -> None:
    """Print the figures as JSON; exit 1 if anything was wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutations", type=int, required=True)
    parser.add_argument("--state", type=Path, help="file of figures, from which a run goes on")
    parser.add_argument("--only", help="name of a file")
    given = parser.parse_args()
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    warm()
    found = run(given.mutations, given.state, given.only)
    print(json.dumps(asdict(found), indent=2))
    raise SystemExit(bool(found.failures))


if __name__ == "__main__":
    main()
