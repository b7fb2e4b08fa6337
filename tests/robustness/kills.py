"""Kills and refusals at the file-system events of every command, and what is left of it.

    python tests/robustness/kills.py --kills 1000 --state kills.json

Each case runs a command in a folder of its own, which is cut short at one event; then the same
command once more, to its end. What it leaves must equal what a run that was never disturbed leaves.
Commands take turns. Figures are in the state file after every case, from which a run goes on.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]

from events import (  # noqa: E402
    Action,
    Event,
    can_run,
    compiled,
    environment,
    in_fork,
    read_events,
    warm,
)
from figures import Figures  # noqa: E402

REFUSALS = (Action.FULL, Action.READ_ONLY, Action.DENIED)
ENDS = {Action.KILL: (-9, 0), Action.TEAR: (-9, 0), Action.FULL: (0, 4)}
ENDS |= dict.fromkeys((Action.READ_ONLY, Action.DENIED), (0, 2, 4))
"""Exit codes of a command that is cut short; 0 where only something that it does not rest on was
lost, which it says."""


@dataclass(slots=True)
class Found(Figures):
    """What a run of the harness has found."""

    cases: dict[str, int] = field(default_factory=dict)
    """By command and action."""
    done: dict[str, int] = field(default_factory=dict)
    """Cases by command."""


def chosen(events: Sequence[Event], kills: int) -> Iterator[tuple[Event, Action]]:
    """Where a command is killed, `kills` times, and every fourth time what the system refuses.

    Kills come before the first and the last event of each kind and in the middle of its writes,
    then before other events evenly. Each kind's first event and all that follow are refused, in
    turn because the disk is full, the file system is read-only, or a permission is missing.
    """
    first: dict[tuple[str, str], Event] = {}
    for event in events:
        first.setdefault(event.kind, event)
    found = _ends_of_kinds(events)
    deaths = _evenly(list(found), kills)
    others = [e.number for e in events if (e.number, Action.KILL) not in found]
    deaths += [(number, Action.KILL) for number in _evenly(others, kills - len(deaths))]
    refusals = iter([(e.number, REFUSALS[i % 3]) for i, e in enumerate(first.values())])
    for index, (number, action) in enumerate(deaths):
        yield events[number - 1], action
        if index % 3 == 2:
            yield from ((events[n - 1], why) for n, why in islice(refusals, 1))


def _ends_of_kinds(events: Sequence[Event]) -> dict[tuple[int, Action], None]:
    """The first and the last event of each kind, and the middle of those that write."""
    first: dict[tuple[str, str], Event] = {}
    last: dict[tuple[str, str], Event] = {}
    for event in events:
        first.setdefault(event.kind, event)
        last[event.kind] = event
    found: dict[tuple[int, Action], None] = {}
    for event in (*first.values(), *last.values()):
        found[event.number, Action.KILL] = None
        if event.operation == "write":
            found[event.number, Action.TEAR] = None
    return found


def places(events: Sequence[Event]) -> int:
    """How many kills `chosen` can choose among."""
    found = _ends_of_kinds(events)
    return len({event.number for event in events} | {number for number, _ in found}) + sum(
        action is Action.TEAR for _, action in found
    )


def shares(kills: int, most: Sequence[int]) -> list[int]:
    """Kills of each command: the same for all, and what some have no place for to the others."""
    given = [0] * len(most)
    for turn, index in enumerate(sorted(range(len(most)), key=most.__getitem__)):
        given[index] = min(most[index], (kills - sum(given)) // (len(most) - turn))
    return given


def _evenly(items: list, count: int) -> list:
    """At most `count` of them, from first to last."""
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]


def disturb(command, expected, event, action, folder, figures) -> None:
    """Run the command with the disturbance, then without, and compare what is left."""
    from commands import outcome

    work = command.folder(folder / "work")
    case = f"{command.name}, {action.name} at {event.operation} {event.path} ({event.number})"
    kind = f"{command.name}: {action.name}"
    figures.cases[kind] = figures.cases.get(kind, 0) + 1
    cut = in_fork(command.arguments, work, action=action, at=event.number)
    figures.add(cut)
    if cut.code not in ENDS[action]:
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


def run(kills: int, only: str | None = None, state: Path | None = None) -> Found:
    """Disturb every command, `kills` times in all."""
    from commands import make_commands

    figures = Found.read(state)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make_commands(folder, lambda arguments, path: _require_done(arguments, path))
        commands = [c for c in made if only is None or only == c.name]
        found = [(command, *_undisturbed(command, folder, figures)) for command in commands]
        own = shares(kills, [places(events) for _, _, events in found])
        waiting = [
            (command, expected, islice(chosen(events, n), figures.done.get(command.name, 0), None))
            for (command, expected, events), n in zip(found, own, strict=True)
        ]
        while waiting:
            for turn in tuple(waiting):
                command, expected, left = turn
                event, action = next(left, (None, None))
                if event is None:
                    waiting.remove(turn)
                    continue
                disturb(command, expected, event, action, folder, figures)
                figures.done[command.name] = figures.done.get(command.name, 0) + 1
                figures.write(state)
    return figures


def _undisturbed(command, folder: Path, figures: Found) -> tuple[dict, list[Event]]:
    """What the command leaves, and its events."""
    from commands import outcome

    work = command.folder(folder / "undisturbed")
    ended = in_fork(command.arguments, work, record=folder / "events")
    figures.add(ended)
    if ended.code != 0:
        raise RuntimeError(f"{command.name}: {ended.stderr}")
    expected = outcome(work)
    shutil.rmtree(work)
    return expected, read_events(folder / "events")


def _require_done(arguments: Sequence[str], folder: Path) -> None:
    ended = in_fork(arguments, folder)
    if ended.code != 0:
        raise RuntimeError(f"{' '.join(arguments)}: {ended.stderr}")


def main() -> None:
    """Print the figures as JSON; exit 1 if anything was lost or different."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--only", help="name of a command")
    parser.add_argument("--state", type=Path, help="file of figures, from which a run goes on")
    given = parser.parse_args()
    if not can_run():
        raise SystemExit("this needs Linux and a C compiler (cc)")
    if "AUTOQUANT_FILE_EVENTS" not in os.environ:
        library = compiled(Path(tempfile.mkdtemp()))
        os.execve(sys.executable, [sys.executable, *sys.argv], environment(library))
    os.environ |= {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    warm()
    figures = run(given.kills, given.only, given.state)
    print(json.dumps(asdict(figures), indent=2))
    raise SystemExit(bool(figures.failures))


if __name__ == "__main__":
    main()
