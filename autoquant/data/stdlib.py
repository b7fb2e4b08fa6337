"""The Python standard library's own source as text that exists on every machine.

Modules are split by a fixed rule on their top-level name, so that a package and its submodules
stay on one side: the bundled reference model was trained on one side, and the other side is the
default calibration text.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 5

_NOT_PROSE = frozenset({"encodings", "pydoc_data"})
"""Generated tables: megabytes of near-identical lines."""

_NOT_EVERYWHERE = frozenset(
    {"ensurepip", "idlelib", "lib2to3", "site-packages", "dist-packages", "tkinter", "turtledemo"}
)
"""Vendored wheels, installed packages, and parts that distributions package apart."""

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


def is_held_out(module: str) -> bool:
    """Whether the top-level module `module` is on the held-out side of the fixed split."""
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def held_out_documents(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (relative path, source text) of every held-out module, tests excluded, in path order.

    Args:
        root: the standard library's folder; the running interpreter's by default.
    """
    for path, module, is_test in _modules(root):
        if not is_test and is_held_out(module):
            yield from _read(path, root)


def training_documents(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (relative path, source text) of every training module and its tests, in path order."""
    for path, module, _ in _modules(root):
        if not is_held_out(module):
            yield from _read(path, root)


def _root(root: Path | None) -> Path:
    return root if root is not None else Path(sysconfig.get_path("stdlib"))


def _modules(root: Path | None) -> Iterator[tuple[Path, str, bool]]:
    """Yield (path, top-level module, is a test): `test/test_json/x.py` belongs to module `json`."""
    base = _root(root)
    for path in sorted(base.rglob("*.py")):
        parts = path.relative_to(base).parts
        if (_NOT_PROSE | _NOT_EVERYWHERE | {"__pycache__"}).intersection(parts):
            continue
        is_test = bool(_TEST_FOLDERS.intersection(parts[:-1]))
        name = parts[1] if parts[0] == "test" and len(parts) > 1 else parts[0]
        yield path, name.removesuffix(".py").removeprefix("test_"), is_test


def _read(path: Path, root: Path | None) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # files that test source encodings
        return
    if text.strip():
        yield path.relative_to(_root(root)).as_posix(), text
