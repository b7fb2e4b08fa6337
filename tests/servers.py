"""Servers of pages, each a process of its own, on this machine alone: MLflow's and Optuna's."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from launched import free_port

STARTS_WITHIN = 120.0


class Server:
    """A running server; `stop` kills it as a crash would.

    Args:
        words: of Python's command line, for a port.
        log: takes what it prints.
        page: that it answers with once it runs.
    """

    def __init__(self, words: Callable[[int], Sequence[str]], log: Path, page: str = "") -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log, self._page = log, page
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *words(port)],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return once the server answers."""
        deadline = time.monotonic() + STARTS_WITHIN
        while True:
            try:
                urllib.request.urlopen(f"{self.url}{self._page}", timeout=5).close()
                return
            except (OSError, urllib.error.URLError):
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        """End the server and its workers."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def mlflow_server(folder: Path) -> AbstractContextManager[Server]:
    """A server over `folder / "mlflow.db"`, with artifacts beside it; killed in the end."""

    def words(port: int) -> list[str]:
        return [
            *("-m", "mlflow", "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(folder / "mlartifacts")),
        ]

    return _served(words, folder / "server.log", "/health")


def optuna_dashboard(study: Path, log: Path) -> AbstractContextManager[Server]:
    """Optuna's dashboard of the journal `study`, as its own command starts it."""

    def words(port: int) -> list[str]:
        flags = (str(study), "--server", "wsgiref", "--host", "127.0.0.1", "--port", str(port))
        return ["-c", "from optuna_dashboard._cli import main; main()", *flags]

    return _served(words, log, "/dashboard")


@contextmanager
def _served(words: Callable[[int], Sequence[str]], log: Path, page: str) -> Iterator[Server]:
    server = Server(words, log, page)
    try:
        server.wait()
        yield server
    finally:
        server.stop()
