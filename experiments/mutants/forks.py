"""A piece of work in a process of its own, and a changed program in such a process."""

import gc
import importlib.abc
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

FAILED = 70
"""Status of a piece of work that ended with an exception."""
IS_FUNCTION = 0x0001
"""CO_OPTIMIZED: a function's code has it, a module's and a class's have not."""


def forked(work: Callable[[], int], *, limit: float) -> tuple[int | None, float]:
    """The status that `work` returns, or None beyond the limit, and seconds; prints nothing."""
    folder = tempfile.mkdtemp()
    started = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        status = FAILED
        try:
            os.setsid()
            os.environ["PYTEST_DEBUG_TEMPROOT"] = os.environ["TMPDIR"] = tempfile.tempdir = folder
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            status = int(work())
        finally:
            os._exit(status)
    done, status = 0, 0
    while not done and time.perf_counter() - started < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.005)
    if not done:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    shutil.rmtree(folder, ignore_errors=True)
    return os.waitstatus_to_exitcode(status) if done else None, time.perf_counter() - started


def functions_of(path: Path) -> list[FunctionType]:
    """Every function of an imported file that is there now; leaves nothing to collect to forks."""
    gc.collect()
    found = [one for one in gc.get_objects() if isinstance(one, FunctionType)]
    gc.freeze()  # a collection would copy all memory that a fork shares
    return [function for function in found if function.__code__.co_filename == str(path)]


def patch(functions: list[FunctionType], source: str) -> None:
    """Give functions the code that they have in `source`."""
    new = dict(_functions(compile(source, functions[0].__code__.co_filename, "exec")))
    for function in functions:
        code = new.get(_place(function.__code__))
        if code is not None:
            function.__code__ = code


def _functions(code: CodeType) -> Any:
    """Yield place and code of every function that is not inside another."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_flags & IS_FUNCTION:
                yield _place(inner), inner
            else:
                yield from _functions(inner)


def _place(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


class Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports a module of the repository from another text."""

    def __init__(self, root: Path, file: str, source: str) -> None:
        self._name = file.removesuffix(".py").replace("/", ".")
        self._path, self._source = str(root / file), source

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=self)

    def get_data(self, path: str) -> bytes:
        return self._source.encode()

    def get_filename(self, name: str) -> str:
        return self._path

    def install(self) -> None:
        sys.meta_path.insert(0, self)
