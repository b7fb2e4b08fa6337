"""Commands in forks of this process, which are killed or meet a full disk at one change of a file.

This process has `file_events.c` loaded before the C library (`restarted` sees to it) and everything
that a command imports, so that a command takes no longer than its work.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
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
    """Exit code; negative for a signal."""
    stderr: str
    seconds: float
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
) -> Ended:
    """Run `autoquant` with these arguments in `folder`.

    Args:
        arguments: of the command line.
        folder: is the working directory; changes below it are events.
        action: what happens at event `at`.
        at: number of an event, from 1.
        record: file for one line an event.
        patience: seconds until a hanging command is killed.
    """
    output = folder.with_suffix(".stderr")
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(arguments, folder, output, action, at, record)
    status, usage = _wait(child, started + patience)
    return Ended(
        code=os.waitstatus_to_exitcode(status),
        stderr=output.read_text(errors="replace"),
        seconds=time.monotonic() - started,
        megabytes=usage.ru_maxrss // 1024,
    )


def read_events(record: Path) -> list[Event]:
    """What `in_fork` recorded."""
    lines = (line.partition("\t") for line in record.read_text(errors="replace").splitlines())
    return [Event(number, name, path) for number, (name, _, path) in enumerate(lines, start=1)]


def _become(
    arguments: Sequence[str],
    folder: Path,
    output: Path,
    action: Action,
    at: int,
    record: Path | None,
) -> None:
    """Turn this fork into the command; never returns."""
    from autoquant.cli import cli

    code = 99
    try:
        os.chdir(folder)
        os.environ["AUTOQUANT_CACHE"] = str(folder / "cache")
        for stream, target in ((1, os.devnull), (2, output)):
            file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, stream)
        sys.argv = ["autoquant", *arguments]
        library = ctypes.CDLL(os.environ[_LOADED])
        library.events_arm.argtypes = (
            ctypes.c_char_p,
            ctypes.c_long,
            ctypes.c_int,
            ctypes.c_char_p,
        )
        library.events_arm(bytes(folder), at, action, bytes(record) if record else b"")
        cli.main(list(arguments), prog_name="autoquant")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


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
