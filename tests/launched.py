"""Several processes that run `autoquant` together, as a launcher starts them."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from click.testing import CliRunner

PATIENCE = 400
"""Seconds that processes may take on a busy machine."""

_AUTOQUANT = (sys.executable, "-m", "autoquant")


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What `torchrun`, or `srun` with a few exports, tells each process."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port: int = own.getsockname()[1]
        return port


def start(
    commands: Sequence[Sequence[object]],
    folder: Path,
    *,
    environments: Sequence[Mapping[str, str]] = (),
) -> list[subprocess.Popen[bytes]]:
    """A process for each command line, all of one group; what they print goes into files."""
    port, size = free_port(), len(commands)
    processes = []
    for rank, words in enumerate(commands):
        own = dict(environments[rank]) if environments else {}
        with _log(folder, rank, "out") as out, _log(folder, rank, "err") as err:
            processes.append(
                subprocess.Popen(
                    [*_AUTOQUANT, *map(str, words)],
                    stdout=out,
                    stderr=err,
                    env=os.environ | environment(rank, size, port) | own,
                )
            )
    return processes


def wait_for(line: str, printed: Callable[[], str], process: subprocess.Popen[bytes]) -> None:
    """Return when a running process has printed a line that matches."""
    deadline = time.monotonic() + PATIENCE
    while not re.search(line, printed(), re.MULTILINE):
        assert process.poll() is None, printed()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_this_process(words: Sequence[object]) -> None:
    """Run a command line, which must succeed, without starting a process."""
    from autoquant.cli import cli

    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 0, done.output


@contextmanager
def alone(words: Sequence[object], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process for a command line, whose standard error goes into a file."""
    with log.open("wb") as stderr:
        yield subprocess.Popen(
            [*_AUTOQUANT, *map(str, words)], stdout=subprocess.DEVNULL, stderr=stderr
        )


def printed(folder: Path, rank: int, stream: str) -> str:
    return (folder / f"rank-{rank}.{stream}").read_text()


def errors(folder: Path, size: int) -> list[str]:
    """The first lines of the errors that all processes have printed."""
    lines = [line for rank in range(size) for line in printed(folder, rank, "err").splitlines()]
    return [line for line in lines if line.startswith("error:")]


def torchrun(size: int, words: Sequence[object]) -> subprocess.CompletedProcess[str]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return subprocess.run(
        [*launcher, f"--nproc-per-node={size}", "-m", "autoquant", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def _log(folder: Path, rank: int, stream: str) -> IO[bytes]:
    folder.mkdir(exist_ok=True, parents=True)
    return (folder / f"rank-{rank}.{stream}").open("wb")
