"""Kills and full disks at the file-system events of every command, and what is left of it.

    python tests/robustness/kills.py --kills 1000

Each case runs a command in a folder of its own, which is cut short at one event; then the same
command once more, to its end. What it leaves must equal what a run that was never disturbed leaves.
"""

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]

from events import (  # noqa: E402
    Action,
    Ended,
    Event,
    can_run,
    compiled,
    environment,
    in_fork,
    read_events,
)

ENDS_OF_A_FULL_DISK = (0, 4)
"""Exit codes of a command whose disk is full; 0 where only something that it does not rest on was
lost, which it says."""


@dataclass(slots=True)
class Figures:
    """What a run of the harness has found."""

    cases: dict[str, int] = field(default_factory=dict)
    """By command and action."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """Of the longest command."""
    megabytes: int = 0
    """Of the largest command."""

    def add(self, ended: Ended) -> None:
        """Note how long and how large a command was."""
        self.seconds = max(self.seconds, ended.seconds)
        self.megabytes = max(self.megabytes, ended.megabytes)


def chosen(events: Sequence[Event], cases: int) -> Iterator[tuple[Event, Action]]:
    """The first and the last event of each kind, then others evenly, each killed before it.

    Writes are torn as well, and the disk is full from each kind's first event on.
    """
    first: dict[tuple[str, str], Event] = {}
    last: dict[tuple[str, str], Event] = {}
    for event in events:
        first.setdefault(event.kind, event)
        last[event.kind] = event
    found: dict[tuple[int, Action], tuple[Event, Action]] = {}
    for event in (*first.values(), *last.values()):
        found[event.number, Action.KILL] = event, Action.KILL
        if event.operation == "write":
            found[event.number, Action.TEAR] = event, Action.TEAR
    for event in first.values():
        if event.operation in ("open", "write", "mkdir"):
            found[event.number, Action.FULL] = event, Action.FULL
    wanted = list(found.values())
    if len(wanted) >= cases:
        step = len(wanted) / cases
        yield from (wanted[int(index * step)] for index in range(cases))
        return
    yield from wanted
    others = [e for e in events if (e.number, Action.KILL) not in found]
    step = max(1.0, len(others) / (cases - len(wanted)))
    for index in range(min(cases - len(wanted), len(others))):
        yield others[int(index * step)], Action.KILL


def disturb(command, expected, event, action, folder, figures) -> None:
    """Run the command with the disturbance, then without, and compare what is left."""
    from commands import outcome

    work = command.folder(folder / "work")
    case = f"{command.name}, {action.name} at {event.operation} {event.path} ({event.number})"
    kind = f"{command.name}: {action.name}"
    figures.cases[kind] = figures.cases.get(kind, 0) + 1
    cut = in_fork(command.arguments, work, action=action, at=event.number)
    figures.add(cut)
    if cut.code not in ((-9, 0) if action is not Action.FULL else ENDS_OF_A_FULL_DISK):
        figures.failures.append(f"{case}: ended with {cut.code}: {cut.stderr[-500:]}")
    again = in_fork(command.arguments, work)
    figures.add(again)
    refused = command.name == "export" and again.code == 5 and cut.code in (0, -9)
    if again.code != 0 and not refused:
        figures.failures.append(f"{case}: then {again.code}: {again.stderr[-500:]}")
    elif (found := outcome(work)) != expected:
        names = [n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)]
        figures.failures.append(f"{case}: different afterwards: {sorted(names)}")
    shutil.rmtree(work)


def run(kills: int, only: str | None = None) -> Figures:
    """Disturb every command, `kills` times in all."""
    from commands import make_commands, outcome

    figures = Figures()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make_commands(folder, lambda arguments, path: _require_done(arguments, path))
        commands = [c for c in made if only is None or only == c.name]
        for index, command in enumerate(commands):
            work = command.folder(folder / "undisturbed")
            ended = in_fork(command.arguments, work, record=folder / "events")
            figures.add(ended)
            if ended.code != 0:
                raise RuntimeError(f"{command.name}: {ended.stderr}")
            expected = outcome(work)
            shutil.rmtree(work)
            cases = kills * (index + 1) // len(commands) - kills * index // len(commands)
            for event, action in chosen(read_events(folder / "events"), cases):
                disturb(command, expected, event, action, folder, figures)
    return figures


def _require_done(arguments: Sequence[str], folder: Path) -> None:
    ended = in_fork(arguments, folder)
    if ended.code != 0:
        raise RuntimeError(f"{' '.join(arguments)}: {ended.stderr}")


def _warm() -> None:
    """Import what the commands import, once for all forks, and leave pictures out of reports."""
    import autoquant.cli.search
    import matplotlib.pyplot  # noqa: F401
    import mlflow.tracking  # noqa: F401
    import transformers

    import autoquant.export.export
    import autoquant.export.verify
    import autoquant.run.stages  # noqa: F401
    from autoquant.cli import MODULES
    from autoquant.report import html

    for module in MODULES.values():
        importlib.import_module(module)
    for name in ("LlamaForCausalLM", "Qwen3MoeForCausalLM", "AutoTokenizer"):
        getattr(transformers, name)
    html.available = lambda record: []


def main() -> None:
    """Print the figures as JSON; exit 1 if anything was lost or different."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--only", help="name of a command")
    given = parser.parse_args()
    if not can_run():
        raise SystemExit("this needs Linux and a C compiler (cc)")
    if "AUTOQUANT_FILE_EVENTS" not in os.environ:
        library = compiled(Path(tempfile.mkdtemp()))
        os.execve(sys.executable, [sys.executable, *sys.argv], environment(library))
    os.environ |= {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    _warm()
    figures = run(given.kills, given.only)
    print(json.dumps(asdict(figures), indent=2))
    raise SystemExit(bool(figures.failures))


if __name__ == "__main__":
    main()
