"""Servers that keep studies of Optuna, on this machine alone: PostgreSQL and a gRPC proxy."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from launched import free_port

STARTS_WITHIN = 60.0

_PROGRAMS = ("initdb", "pg_ctl")
_NOBODY = 65534
"""PostgreSQL refuses to run as root."""

_PROXY = """
import sys, optuna
from optuna.storages import RDBStorage, run_grpc_proxy_server
run_grpc_proxy_server(RDBStorage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
"""


class StorageServer(Protocol):
    """A server that is started and stopped, and keeps what it was told."""

    url: str

    def start(self) -> None:
        """Return once it answers."""

    def stop(self) -> None:
        """End it as a crash would."""


def why_no_postgres() -> str | None:
    """Which program is not there, or None."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    return f"{missing[0]} is absent: apt-get install postgresql" if missing else None


class Postgres:
    """A cluster of its own in a folder that its user may enter."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="autoquant-postgres-"))
        self._user = {"user": _NOBODY, "group": _NOBODY} if os.getuid() == 0 else {}
        if self._user:
            shutil.chown(self._folder, _NOBODY, _NOBODY)
        self._port = free_port()
        self.url = f"postgresql://tester@127.0.0.1:{self._port}/postgres"
        self._run("initdb", "--auth=trust", "--username=tester", "--no-sync")

    def start(self) -> None:
        options = f"-p {self._port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(self._folder / "log")
        self._run("pg_ctl", "start", "--wait", "--log", log, "-o", options)

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "--mode=immediate")

    def remove(self) -> None:
        """End it, if it runs, and delete what it kept."""
        if (self._folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._folder)

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [program, *arguments, "-D", str(self._folder / "data")],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self._folder,
            timeout=STARTS_WITHIN,
            **self._user,  # type: ignore[call-overload]
        )


class Proxy:
    """Optuna's gRPC proxy before a SQLite file."""

    def __init__(self, folder: Path) -> None:
        self._port, self._file = free_port(), folder / "behind-proxy.db"
        self.url = f"grpc://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> int:
        """Its number."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        import grpc

        words = [sys.executable, "-c", _PROXY, f"sqlite:///{self._file}", str(self._port)]
        self._process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        with grpc.insecure_channel(f"127.0.0.1:{self._port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=STARTS_WITHIN)

    def stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def remove(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            self.stop()


@contextmanager
def running(server: Postgres | Proxy) -> Iterator[StorageServer]:
    """The server while it is needed."""
    try:
        server.start()
        yield server
    finally:
        server.remove()
