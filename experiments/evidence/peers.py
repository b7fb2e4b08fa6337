"""What each peer is given, the same text and bytes, and what is kept of how it made its checkpoint.

A peer runs in an interpreter of its own and writes `OUT/checkpoint`; `OUT/made.json` says how.
"""

import argparse
import json
import re
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from autoquant.data.passages import PASSAGE_SEQUENCES, cut, deal
from autoquant.data.text import load_corpus
from autoquant.data.tokenizer import load_tokenizer
from autoquant.data.tokens import TokenPlan
from autoquant.plan.budget import Budget, Scope
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import load_space
from autoquant.source.source import open_source
from experiments.common import record

CHECKPOINT, MADE, TEXT = "checkpoint", "made.json", "text.jsonl"

SIDES = ("calibration", "search")
"""Of the text that peers see; what is judged lies on the third."""

_POLL = 0.25
"""Seconds between two looks at the device's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a budget leaves for the layers that are searched."""

    checkpoint_bytes: int
    """Most bytes of all tensors."""
    searched_bytes: int
    elements: int
    """Of the searched layers."""
    linears: int

    @classmethod
    def of(cls, model: Path, bpe: float) -> "Room":
        """As a search with `--budget-scope searched` has it."""
        plan = make_plan(open_source(model), load_space("default"))
        sizes = plan.accounting
        most = plan.limit(Budget(bpe, Scope.SEARCHED)).at_most
        return cls(
            checkpoint_bytes=most,
            searched_bytes=most
            - sizes.checkpoint_bytes(sizes.floor)
            + sizes.searched_bytes(sizes.floor),
            elements=sizes.searched_elements,
            linears=sum(len(sizes.groups[name].linears) for name in sizes.searched),
        )


@dataclass(slots=True, kw_only=True)
class Watched:
    """A command that has run, and what it took."""

    seconds: float = 0.0
    marks: dict[str, float] = field(default_factory=dict)
    """Seconds at which a line first began so."""
    host_bytes: int = 0
    """Most that a single process of it held."""
    device_bytes: int | None = None
    """Most that the device held beyond what it held before; None without one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every peer."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="as `autoquant --calibration`")
    parser.add_argument("--budget-bpe", type=float, required=True, help="of the searched layers")
    parser.add_argument("--python", default=shutil.which("python3"), help="that has the peer")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text")
    length = TokenPlan().sequence_length
    parser.add_argument(
        "--sequence-length", type=int, default=length, help="by which our search cuts the text"
    )
    parser.add_argument("--samples", type=int, help="sequences instead of the peer's own number")
    parser.add_argument("--length", type=int, help="tokens of each, likewise")
    parser.add_argument("--work", type=Path, required=True, help="for files in between")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--commit", default=None, help="of the code, where git cannot tell")


def write_text(arguments: argparse.Namespace, sequences: int = PASSAGE_SEQUENCES) -> Path:
    """All passages of both sides that a search calibrates and searches on.

    Args:
        arguments: those of `add_arguments`.
        sequences: of a passage, at most, that stand in one line.
    """
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=False)
    first = tokenizer.bos_token_id if tokenizer("a")["input_ids"][1:] else None
    corpus = load_corpus(str(arguments.text))
    sides = deal(cut(corpus, tokenizer, arguments.sequence_length), arguments.seed)
    file = Path(arguments.work / TEXT).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        for side in SIDES:
            for _, passage in groupby(sides[side], key=lambda row: row.passage):
                while rows := list(islice(passage, sequences)):
                    tokens = [t for row in rows for t in row.tokens[row.tokens[0] == first :]]
                    lines.write(json.dumps({"text": tokenizer.decode(tokens)}) + "\n")
    return file


def watch(
    command: Sequence[str], environment: Mapping[str, str], log: Path, marks: Sequence[str] = ()
) -> Watched:
    """Run a command and keep its lines.

    Raises:
        SystemExit: it failed.
    """
    found, before = Watched(), _device_bytes()
    ended = threading.Event()
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    poll = threading.Thread(target=_poll, args=(found, before, ended))
    poll.start()
    assert process.stdout is not None
    with log.open("w", encoding="utf-8") as lines:
        for line in process.stdout:
            lines.write(line)
            for mark in marks:
                if line.startswith(mark):
                    found.marks.setdefault(mark, time.perf_counter() - started)
    code = process.wait()
    ended.set()
    poll.join()
    found.seconds = time.perf_counter() - started
    found.host_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    if code:
        tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-15:])
        raise SystemExit(f"{tail}\n{command[0]} ended with {code}: see {log}")
    return found


def _poll(found: Watched, before: int | None, ended: threading.Event) -> None:
    while before is not None and not ended.wait(_POLL):
        used = (_device_bytes() or before) - before
        found.device_bytes = max(found.device_bytes or 0, used)


def _device_bytes() -> int | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    numbers = re.findall(r"\d+", done.stdout)
    return sum(map(int, numbers)) << 20 if numbers and not done.returncode else None


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensor data in a folder's safetensors files: what follows their headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as content:
            header = int.from_bytes(content.read(8), "little")
        total += file.stat().st_size - header - 8
    return total


def keep(
    arguments: argparse.Namespace,
    made: Path,
    watched: Watched,
    *,
    who: str,
    packages: Sequence[str],
    room: Room,
    shared_seconds: float = 0.0,
) -> None:
    """Move a checkpoint to where it is kept, and write what it took.

    Raises:
        SystemExit: it has more bytes than it was asked for.
    """
    arguments.out.mkdir(parents=True, exist_ok=True)
    place = arguments.out / CHECKPOINT
    shutil.rmtree(place, ignore_errors=True)
    shutil.move(made, place)
    stored = tensor_bytes(place)
    result = record.provenance(arguments.commit) | {
        "who": who,
        "packages": {name: _version(arguments.python, name) for name in packages},
        "budget_bpe": arguments.budget_bpe,
        "most_bytes": room.checkpoint_bytes,
        "checkpoint_bytes": stored,
        "seconds": watched.seconds + shared_seconds,
        "host_bytes": watched.host_bytes,
        "device_bytes": watched.device_bytes,
        "settings": record.settings(arguments),
    }
    record.write(arguments.out / MADE, result)
    left = room.checkpoint_bytes - stored
    print(f"{place}: {stored:,} bytes, {left:,} left of the budget, {result['seconds']:.0f} s")
    if left < 0:
        raise SystemExit(f"{who} does not keep the budget")


def ask(python: str, code: str) -> str:
    """What a line of Python prints there."""
    command = [python, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def _version(python: str, name: str) -> str:
    return ask(python, f"from importlib.metadata import version; print(version({name!r}))")


def load(out: Path) -> dict[str, Any]:
    """What `keep` wrote."""
    made: dict[str, Any] = json.loads((out / MADE).read_text(encoding="utf-8"))
    return made
