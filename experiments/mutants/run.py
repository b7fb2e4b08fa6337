"""Test every mutant of some files; README.md says how.

    python -m experiments.mutants.run autoquant/plan --tests tests/plan --out FILE

Tests are collected once for each file. A mutant is a fork of that process in which functions have
other code; where the change is outside of functions, the fork imports everything anew.
"""

import argparse
import importlib
import json
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import pytest
from hypothesis import Phase, settings

from experiments.mutants.covering import OPTIONS, Covering, trace
from experiments.mutants.forks import FAILED, Changed, forked, functions_of, patch
from experiments.mutants.mutants import Mutant, mutants

T = TypeVar("T")

ROOT = Path.cwd()
SLOWER, PATIENCE = 3, 3
"""A test hangs that takes so many times its seconds unchanged, and so many more."""
STATES = {0: "survived", FAILED: "error", 3: "error", 5: "error"} | dict.fromkeys(
    (None, -signal.SIGPROF), "timed out"
)
"""By the status of a fork; any other is a mutant's that fails a test or cannot be imported."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="files or folders to change")
    parser.add_argument("--tests", nargs="+", required=True, help="files or folders of tests")
    parser.add_argument("--out", type=Path, required=True, help="goes on where it was stopped")
    parser.add_argument("--again", type=Path, help="results whose survivors alone are tested")
    parser.add_argument(
        "--most-seconds",
        type=float,
        default=float("inf"),
        help="a mutant meets no more tests, the likeliest first, than take so long together",
    )
    arguments = parser.parse_args()
    settings.register_profile("mutants", phases=set(Phase) - {Phase.shrink, Phase.explain})
    settings.load_profile("mutants")
    traced = arguments.out.with_suffix(".tests.json")
    if not traced.exists():
        status, _ = forked(
            lambda: trace(ROOT, arguments.files, arguments.tests, traced), limit=float("inf")
        )
        if status:
            raise SystemExit("the tests must pass before anything is changed")
    covering = Covering.read(traced)
    for name in covering.modules:
        with suppress(ImportError):
            importlib.import_module(name)
    done = {tuple(row["key"]) for row in rows(arguments.out)}
    again = rows(arguments.again) if arguments.again else []
    wanted = {_but_line(row["key"]) for row in again if row["state"] == "survived"}
    for path in arguments.files:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            todo = [m for m in mutants(ROOT, str(file)) if m.key not in done]
            todo = [m for m in todo if _but_line(m.key) in wanted] if again else todo
            InForks(str(file), covering, arguments.out, arguments.most_seconds).run(todo)


def rows(path: Path) -> list[dict[str, Any]]:
    """Results so far."""
    return (
        [*map(json.loads, path.read_text(encoding="utf-8").splitlines())] if path.exists() else []
    )


def _but_line(key: Sequence[Any]) -> tuple[Any, ...]:
    file, _, *what = key
    return file, *what


class Killer:
    """A plugin that writes down the test that fails."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.path.write_text(report.nodeid, encoding="utf-8")

    def taken(self) -> str:
        """The test, once; nothing where none failed."""
        found = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        self.path.unlink(missing_ok=True)
        return found


class InForks:
    """The mutants of one file, as a plugin that replaces pytest's loop over its tests.

    For each mutant it runs the tests that execute the changed statement, until one fails: the
    fastest first, where one that has killed n mutants of the file counts as n + 1 times as fast.
    `most` seconds of tests are enough for a mutant that none of them fails.
    """

    def __init__(self, file: str, covering: Covering, out: Path, most: float) -> None:
        self._file, self._covering, self._out, self._most = file, covering, out, most
        self._killer = Killer(out.with_suffix(".killer"))
        self._kills: Counter[str] = Counter()
        self._inside: list[Mutant] = []

    def run(self, todo: list[Mutant]) -> None:
        covered = self._covering.of(self._file)
        files = sorted(set(map(file_of, covered)), key=self._seconds(covered).__getitem__)
        limit = 10 * PATIENCE + SLOWER * sum(self._covering.seconds[test] for test in covered)
        for mutant in todo:
            if mutant.statement is None:
                self._record(mutant, lambda m=mutant: self._anew(m, files), limit)
        self._inside = [mutant for mutant in todo if mutant.statement is not None]
        if self._inside:
            plugins = [self, self._killer]
            forked(lambda: pytest.main([*OPTIONS, *files], plugins=plugins), limit=float("inf"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        functions = functions_of(ROOT / self._file)
        for mutant in self._inside:
            tests = self._covering.of(self._file, mutant.statement)
            items = self._ordered(session.items, tests)
            limit = 10 * PATIENCE + 10 * SLOWER * sum(
                self._covering.seconds[item.nodeid] for item in items
            )
            self._record(
                mutant, lambda m=mutant, i=items: self._in_place(m, functions, session, i), limit
            )
        return True

    def _ordered(self, items: list[pytest.Item], tests: set[str]) -> list[pytest.Item]:
        seconds = self._covering.seconds
        of_files = self._seconds(tests)

        def order(item: pytest.Item) -> tuple[Any, ...]:
            test, file = item.nodeid, file_of(item.nodeid)
            return (
                of_files[file] / (1 + self._kills[file]),
                file,
                seconds[test] / (1 + self._kills[test]),
            )

        ordered = sorted((item for item in items if item.nodeid in tests), key=order)
        return self._within(ordered, [seconds[item.nodeid] for item in ordered])

    def _within(self, tests: list[T], seconds: list[float]) -> list[T]:
        """The first tests that take no more than the most seconds together, one at least."""
        ends = accumulate(seconds)
        return [
            test
            for number, (test, end) in enumerate(zip(tests, ends, strict=True))
            if number == 0 or end <= self._most
        ]

    def _seconds(self, tests: set[str]) -> Counter[str]:
        """What the tests of each file take together."""
        seconds: Counter[str] = Counter()
        for test in tests:
            seconds[file_of(test)] += self._covering.seconds[test]
        return seconds

    def _in_place(
        self,
        mutant: Mutant,
        functions: list[FunctionType],
        session: pytest.Session,
        items: list[pytest.Item],
    ) -> int:
        patch(functions, mutant.source)
        for item, after in zip(items, [*items[1:], None], strict=False):
            # Of the processor's time, which other programs do not take: SIGPROF ends the fork.
            limit = PATIENCE + SLOWER * self._covering.seconds[item.nodeid]
            signal.setitimer(signal.ITIMER_PROF, limit)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if session.testsfailed:
                return 1
        return 0

    def _anew(self, mutant: Mutant, files: list[str]) -> int:
        Changed(ROOT, self._file, mutant.source).install()
        files = sorted(files, key=lambda file: -self._kills[file])  # stable: then the fastest
        of_files = self._seconds(set(self._covering.seconds))
        files = self._within(files, [of_files[file] for file in files])
        return pytest.main([*OPTIONS, "-x", *files], plugins=[self._killer]) if files else 0

    def _record(self, mutant: Mutant, work: Callable[[], int], limit: float) -> None:
        status, seconds = forked(work, limit=limit)
        killer = self._killer.taken()
        self._kills.update({killer, file_of(killer)} - {""})
        state = STATES.get(status, "killed")
        row = {"key": mutant.key, "state": state, "by": killer, "seconds": round(seconds, 2)}
        with self._out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def file_of(test: str) -> str:
    return test.partition("::")[0]


if __name__ == "__main__":
    main()
