"""Commands in forks of this process, which are killed or meet a full disk at one change of a file.

This process has `file_events.c` loaded before the C library (`environment` says how) and everything
that a command imports (`warm`), so that a command takes no longer than its work.
"""

import ctypes
import importlib
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

SOURCE = Path(__file__).with_name("file_events.c")
_LOADED = "AUTOQUANT_FILE_EVENTS"


class Action(IntEnum):
    """What happens at the chosen event; the numbers are those of `file_events.c`."""

    COUNT = 0
    KILL = 1
    TEAR = 2
    """Killed in the middle of a write."""
    FULL = 3
    READ_ONLY = 4
    """The file system, from the event on."""
    DENIED = 5
    """Every change, from the event on."""


@dataclass(frozen=True, slots=True)
class Event:
    """A change of a file or folder."""

    number: int
    operation: str
    path: str
    """Below the folder of the command."""

    @property
    def kind(self) -> tuple[str, str]:
        """What makes the event distinct: the operation, and the path without numbers."""
        return self.operation, re.sub(r"[0-9a-f]{16,}|\d+", "#", self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; negative for a signal, 124 for one that was waited for in vain."""
    stderr: str
    seconds: float
    """Of processor time."""
    megabytes: int
    """Largest resident memory."""


def can_run() -> bool:
    """Whether this system has a C compiler and `LD_PRELOAD`."""
    return sys.platform == "linux" and shutil.which("cc") is not None


def compiled(folder: Path) -> Path:
    """`file_events.c` as a shared library in `folder`."""
    library = folder / "file_events.so"
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-O1",
        "-o",
        str(library),
        str(SOURCE),
        "-ldl",
        "-lpthread",
    ]
    subprocess.run(command, check=True)
    return library


def environment(library: Path) -> dict[str, str]:
    """What a process needs to be one that can arm events."""
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        _LOADED: str(library),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def in_fork(
    arguments: Sequence[str],
    folder: Path,
    *,
    action: Action = Action.COUNT,
    at: int = 0,
    record: Path | None = None,
    patience: float = 120.0,
    memory: int | None = None,
) -> Ended:
    """Run `autoquant` with these arguments in `folder`.

    Args:
        arguments: of the command line.
        folder: is the working directory; changes below it are events.
        action: what happens at event `at`.
        at: number of an event, from 1.
        record: file for one line an event.
        patience: seconds until a hanging command is killed.
        memory: bytes of address space that it may add to this process's.
    """

    def command() -> object:
        from autoquant.cli import cli

        os.environ["AUTOQUANT_CACHE"] = str(folder / "cache")
        sys.argv = ["autoquant", *arguments]
        _arm(folder, action, at, record)
        return cli.main(list(arguments), prog_name="autoquant")

    return call_in_fork(command, folder, patience=patience, memory=memory)


def call_in_fork(
    call: Callable[[], object], folder: Path, *, patience: float = 120.0, memory: int | None = None
) -> Ended:
    """Call in a fork of this process with `folder` as its working directory; see `in_fork`."""
    output = folder.with_suffix(".stderr")
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(call, folder, output, memory)
    status, usage = _wait(child, started + patience)
    return Ended(
        code=os.waitstatus_to_exitcode(status),
        stderr=output.read_text(errors="replace"),
        seconds=usage.ru_utime + usage.ru_stime,
        megabytes=usage.ru_maxrss // 1024,
    )


def read_events(record: Path) -> list[Event]:
    """What `in_fork` recorded."""
    lines = (line.partition("\t") for line in record.read_text(errors="replace").splitlines())
    return [Event(number, name, path) for number, (name, _, path) in enumerate(lines, start=1)]


def warm() -> None:
    """Import what commands import, once for all forks, and leave pictures out of reports."""
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
    for name in ("LlamaForCausalLM", "Qwen3MoeForCausalLM", "AutoTokenizer", "GenerationConfig"):
        getattr(transformers, name)
    html.available = lambda record: []


def _become(call: Callable[[], object], folder: Path, output: Path, memory: int | None) -> None:
    """Turn this fork into what is called; never returns."""
    code = 99
    try:
        os.chdir(folder)
        for stream, target in ((1, os.devnull), (2, output)):
            file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, stream)
        if memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        call()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _arm(folder: Path, action: Action, at: int, record: Path | None) -> None:
    """Begin to count the events of this process, where `file_events.c` is loaded."""
    if _LOADED not in os.environ:
        return
    library = ctypes.CDLL(os.environ[_LOADED])
    library.events_arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_char_p)
    library.events_arm(bytes(folder), at, action, bytes(record) if record else b"")


def _wait(child: int, deadline: float) -> "tuple[int, object]":
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage
        if time.monotonic() > deadline:
            os.kill(child, 9)
            _, _, usage = os.wait4(child, 0)
            return 124 << 8, usage
        time.sleep(0.001)
