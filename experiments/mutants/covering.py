"""Which fast tests execute which lines, from one run under coverage.

pip install coverage
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

OPTIONS = ("-q", "-p", "no:cacheprovider", "-m", "not slow", "--tb=line", "-W", "ignore")


@dataclass(frozen=True, slots=True, kw_only=True)
class Covering:
    """Seconds of each test, and the lines of each file that it executes."""

    seconds: dict[str, float]
    lines: dict[str, dict[str, set[int]]]
    modules: list[str]
    """Everything that they import from elsewhere."""

    def of(self, file: str, lines: range = range(1, 10**6)) -> set[str]:
        """The tests that execute any of the lines; a fixture counts for every test of its file."""
        found = {
            test
            for test, files in self.lines.items()
            if any(line in lines for line in files.get(file, ()))
        }
        shared = {test.removesuffix(FIXTURES) for test in found if test.endswith(FIXTURES)}
        return {test for test in self.seconds if test in found or test.partition("::")[0] in shared}

    @classmethod
    def read(cls, path: Path) -> "Covering":
        data = json.loads(path.read_text(encoding="utf-8"))
        lines = {
            test: {file: set(own) for file, own in files.items()}
            for test, files in data["lines"].items()
        }
        return cls(seconds=data["seconds"], lines=lines, modules=data["modules"])


FIXTURES = "::fixtures"


class _Traced:
    """Tells coverage whose lines it sees, and takes each test's time."""

    def __init__(self, coverage: Any) -> None:
        self._coverage = coverage
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self._coverage.switch_context(item.nodeid.partition("::")[0] + FIXTURES)
        yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self._coverage.switch_context(item.nodeid)
        started = time.perf_counter()
        yield
        self.seconds[item.nodeid] = time.perf_counter() - started


def trace(root: Path, files: list[Path], tests: list[str], out: Path) -> int:
    """Run the tests once; where all pass, write what they execute of the rooms."""
    import coverage

    included = [str(root / (path if path.suffix else path / "*")) for path in files]
    watched = coverage.Coverage(data_file=None, include=included)
    plugin = _Traced(watched)
    watched.start()
    status = pytest.main([*OPTIONS, *tests], plugins=[plugin])
    watched.stop()
    if status:
        return int(status)
    lines: dict[str, dict[str, list[int]]] = defaultdict(dict)
    data = watched.get_data()
    for path in data.measured_files():
        file = Path(path).relative_to(root).as_posix()
        for line, names in data.contexts_by_lineno(path).items():
            for name in filter(None, names):
                lines[name].setdefault(file, []).append(line)
    inside = tuple(map(str, (root / "autoquant", root / "tests")))
    modules = [
        name
        for name, module in sys.modules.items()
        if not (getattr(module, "__file__", None) or "/").startswith(inside)
    ]
    found = {"seconds": plugin.seconds, "lines": lines, "modules": modules}
    out.write_text(json.dumps(found), encoding="utf-8")
    return 0
