"""The commands that are killed, on the smallest models, and what must come out of each."""

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from records import timeless
from searchable import save_searchable, save_text

TOKENS = (
    *("--calibration-tokens", "64"),
    *("--search-tokens", "128"),
    *("--report-tokens", "256"),
    *("--sequence-length", "32"),
    *("--batch-tokens", "64"),
    *("--trials", "1"),
)

OF_TIME = frozenset({"seconds", "created", "versions", "environment", "checksum"})
"""Keys of JSON files that differ from run to run."""

OF_A_PROCESS = frozenset({"seconds.json", "work.jsonl", "tracking.json"})
"""Files that say how long it took, what it took besides, and which MLflow run it has."""

_POINTS = "SELECT run_uuid, key, step, COUNT(*) FROM metrics GROUP BY 1, 2, 3 HAVING COUNT(*) > 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command line and the folder that it is given."""

    name: str
    arguments: tuple[str, ...]
    given: Path | None = None
    """Copied to be the folder that the command works in; an empty one without."""

    def folder(self, path: Path) -> Path:
        """A fresh folder to run in."""
        if self.given is None:
            path.mkdir()
        else:
            shutil.copytree(self.given, path)
        return path


def make_commands(folder: Path, run: Callable[[tuple[str, ...], Path], None]) -> list[Command]:
    """Models, texts, and what was made of them, in `folder`; and the commands that need them.

    Args:
        folder: empty.
        run: runs a command line in a folder.
    """
    dense = save_searchable("llama", folder / "dense", num_hidden_layers=1)
    experts = save_searchable("qwen3_moe", folder / "experts", num_hidden_layers=1)
    text = ("--calibration", str(save_text(folder / "text", documents=12)), *TOKENS)
    search = ("search", str(dense), "--budget-bpe", "11", *text, "--out", "run")
    alone = (*search, "--no-mlflow")
    finished, stored = folder / "finished", folder / "stored"
    for path, arguments in ((finished, alone), (stored, (*search, "--no-export"))):
        path.mkdir()
        run(arguments, path)
    shutil.rmtree(stored / "run")
    export = (
        *("export", str(dense), "--assignment", str(finished / "run/assignment.yaml")),
        *("--calibrated", str(finished / "run/calibration.json"), "--out", "checkpoint"),
    )
    probe = ("probe", str(dense), *text[: text.index("--report-tokens")], "--out", "probes")
    return [
        Command(name="search", arguments=alone),
        Command(name="search with MLflow", arguments=search, given=stored),
        Command(
            name="search of experts with an FP8 cache",
            arguments=(
                *("search", str(experts), "--budget-bpe", "11", *text, "--out", "run"),
                *("--kv-cache", "fp8", "--no-mlflow"),
            ),
        ),
        Command(
            name="search of two budgets",
            arguments=("search", str(dense), "--budget-bpe", "11,12", *alone[4:]),
        ),
        Command(name="probe", arguments=probe),
        Command(name="export", arguments=export),
        Command(
            name="verify",
            arguments=("verify", "run/checkpoint", "--source", str(dense)),
            given=finished,
        ),
        Command(name="report", arguments=("report", "run"), given=finished),
    ]


def outcome(folder: Path) -> dict[str, Any]:
    """What a command has left in `folder`, without times and what names a process.

    Two outcomes of the same command are equal where nothing was lost and nothing is different.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith(("mlartifacts", "mlflow.db", "cache/contents/")):
            continue
        found[name] = "" if path.name in OF_A_PROCESS else _content(path)
    database = folder / "mlflow.db"
    if database.exists():
        found["mlflow.db"] = _recorded(database)
    return found


def _content(path: Path) -> Any:
    if path.suffix == ".html":
        return "a page" if path.read_text().rstrip().endswith("</html>") else "half a page"
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.name in ("study.log", "frontier.log"):
        return timeless(path)
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_text())
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _timeless(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _timeless(value) for key, value in data.items() if key not in OF_TIME}
    if isinstance(data, list):
        return [_timeless(value) for value in data]
    return data


def _recorded(database: Path) -> dict[str, Any]:
    """Runs by status, metrics by number of points, and points that are there twice."""
    with closing(sqlite3.connect(database)) as connection:
        ask = lambda text: connection.execute(text).fetchall()  # noqa: E731
        return {
            "runs": ask("SELECT status, COUNT(*) FROM runs GROUP BY 1 ORDER BY 1"),
            "points": ask("SELECT key, COUNT(*) FROM metrics GROUP BY 1 ORDER BY 1"),
            "twice": ask(_POINTS),
            "models": ask("SELECT status, COUNT(*) FROM logged_models GROUP BY 1 ORDER BY 1"),
            "inputs": ask("SELECT source_type, COUNT(*) FROM inputs GROUP BY 1 ORDER BY 1"),
            "check": ask("PRAGMA integrity_check"),
        }
