"""The run directory: what a search leaves on disk, when it may go on, and who may write.

Every file is written atomically, every JSON has `schema_version` and a checksum of its content, and
line files survive a kill in the middle of a line. One process at a time holds the directory.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

import autoquant
from autoquant.errors import ConfigError, RunConflict, SourceError
from autoquant.files import clear_litter, is_full, is_litter, set_aside, to_json, write_atomic
from autoquant.store.records import (
    append_line,
    parse_object,
    read_content,
    read_lines,
    sealed,
    unsealed,
)

CONFIG = "config.resolved.yaml"
GROUPS = "groups.json"
SENSITIVITY_LOG = "sensitivity.jsonl"
GRADIENT_LOG = "gradient.jsonl"
SENSITIVITY = "sensitivity.json"
NOISE = "noise.json"
INTERACTIONS = "interactions"
CODES = "codes"
"""Codes that cost more to make than to read."""
STATISTICS = "statistics"
"""Second moments of inputs, which such codes are made from."""
HOME = "home.json"
"""Names the run directory beside this one that has both for it: searches of several budgets share
them."""
STUDY = "study.log"
"""The journal of the Optuna study whose trials are the search's."""
TRIALS = "trials.jsonl"
"""Where earlier versions kept the trials."""
ASSIGNMENT = "assignment.yaml"
RESULT = "result.json"
SPLITS = "splits.json"
TOKENS = "tokens.json"
CALIBRATION = "calibration.json"
EVALUATION = "evaluation.json"
"""Scores of tasks; no search writes or reads it."""
REPORT = "report.html"
CHECKPOINT = "checkpoint"
TRACKING = "tracking.json"
"""Names the MLflow run, so that a resumed search continues it."""

SECONDS = "seconds.json"
WORK = "work.jsonl"
"""What each stage took besides time, a line for each time that a process ran it."""

IDENTITY = "run.json"
_LINES = ".jsonl"
_LOCK = ".lock"
_PRELIMINARY = frozenset({IDENTITY, _LOCK, CONFIG, GROUPS, HOME, SPLITS, SECONDS, WORK, TRACKING})
"""What a search writes before it measures anything."""

_SEALED = "sealed"
"""True in the identity of a run all of whose records have checksums; not in one that an earlier
version began, whose records are taken as they are."""

_WORDS = {"model": "the content digest of the model"}
"""What a part of a signature is called where its key says too little."""


class Status(StrEnum):
    """How far the search of a run directory has come."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    FINISHED = "finished"


class RunDirectory:
    """A locked run directory. Use `RunDirectory.open`, as a context manager.

    Leaving the context records the status: finished, interrupted (KeyboardInterrupt) or failed.
    """

    def __init__(self, path: Path, lock: FileLock, identity: dict[str, Any]) -> None:
        self.path = path
        self.earlier_status = Status(identity["status"]) if "status" in identity else None
        """Status found on opening: None for a new run, RUNNING after a kill."""
        self._lock = lock
        self._identity = identity

    @classmethod
    def open(cls, path: Path, signature: Mapping[str, Any], *, resume: bool = True) -> Self:
        """Create the run directory, or go on in it.

        Args:
            path: the folder; created with its parents.
            signature: JSON values that make a search the same: model digest, space, budget, seed...
            resume: go on in a directory with the same signature. False sets an earlier run aside,
                under its name with the time appended, and begins anew.

        Raises:
            RunConflict: the directory is in use, holds another search, or holds foreign files.
            ConfigError: the folder cannot be created or written.
        """
        signature = json.loads(to_json(signature))
        _refuse_foreign(path)
        lock = _hold(path)
        try:
            _clear_litter(path)
            identity = read_identity(path)
            if identity is not None and not resume:
                lock = _set_aside(path, lock)
                identity = None
            elif identity is not None and _is_other(path, identity["signature"], signature):
                _clear(path)
                identity = None
            if identity is None:
                _refuse_foreign(path)
                identity = {
                    "autoquant": autoquant.__version__,
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                    _SEALED: True,
                    "signature": signature,
                }
            run = cls(path, lock, identity)
            run._record(Status.RUNNING)
        except BaseException:
            lock.release()
            raise
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close(Status.FINISHED)
        elif issubclass(kind, KeyboardInterrupt):
            self.close(Status.INTERRUPTED)
        else:
            self.close(Status.FAILED)

    def close(self, status: Status) -> None:
        """Record `status` and let go of the directory."""
        try:
            self._record(status)
        finally:
            self._lock.release()

    @property
    def signature(self) -> dict[str, Any]:
        """What makes this search the same as another, as JSON values."""
        signature: dict[str, Any] = self._identity["signature"]
        return signature

    @property
    def created(self) -> datetime:
        """When the search of this directory was begun, to the second."""
        return datetime.fromisoformat(self._identity["created"])

    @property
    def environments(self) -> list[dict[str, str]]:
        """What the measurements of this directory were made with, each once, the first first."""
        return environments_of(self._identity)

    def add_environment(self, environment: Mapping[str, str]) -> None:
        """Write down what measurements that follow, or were taken over, are made with."""
        if environment not in self.environments:
            self._identity["environments"] = [*self.environments, dict(environment)]
            self._record(Status(self._identity["status"]))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file whole."""
        write_atomic(self.path / name, text)

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON object whole, with its schema version; NaN and infinities become null."""
        write_json(self.path, name, data)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What `write_json` wrote under `name`, or None if nothing has.

        Raises:
            SourceError: the file is damaged or of another schema version.
        """
        return read_json(self.path, name)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line to a line file; it is on the disk when this returns."""
        append_line(self.path / name, record)

    def records(self, name: str) -> list[dict[str, Any]]:
        """Every record appended to `name`, in order; a line torn by a kill was never appended.

        Raises:
            SourceError: a line is damaged or of another schema version.
        """
        return read_records(self.path, name)

    def adopt(self, folder: Path, name: str) -> None:
        """Write what another run directory holds under `name`, a JSON or a line file.

        Raises:
            SourceError: it is damaged or of another schema version.
        """
        if not name.endswith(_LINES):
            self.write_json(name, read_json(folder, name) or {})
            return
        lines = (to_json(sealed(record)) + "\n" for record in read_records(folder, name))
        self.write_text(name, "".join(lines))

    def _record(self, status: Status) -> None:
        self._identity["status"] = str(status)
        self.write_json(IDENTITY, self._identity)


def write_json(folder: Path, name: str, data: Mapping[str, Any]) -> None:
    """What `RunDirectory.write_json` does, for files that no stage of a search writes or reads."""
    write_atomic(folder / name, to_json(sealed(data), indent=2) + "\n")


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """What `RunDirectory.write_json` wrote; see `RunDirectory.read_json`. Takes no lock."""
    content = read_content(folder / name)
    if content is None:
        return None
    origin = str(folder / name)
    must_be_sealed = name != IDENTITY and is_sealed(folder)
    return unsealed(parse_object(content, origin), origin, is_sealed=must_be_sealed)


def home_of(run: Path) -> Path:
    """The folder with the codes and statistics of a run directory: itself, or another beside it
    that is of the same model and calibration tokens.

    Raises:
        SourceError: a file that says so is damaged.
    """
    said = read_json(run, HOME) if (run / IDENTITY).is_file() else None
    if said is None:
        return run
    found = next((other for other in _beside(run) if other.name == said.get("run")), run)
    return found if _rest_on(found) == _rest_on(run) else run


def _beside(run: Path) -> list[Path]:
    """What lies in the folder of a run directory, as far as that can be listed."""
    try:
        return [*run.absolute().parent.iterdir()]
    except OSError:
        return []


def _rest_on(run: Path) -> tuple[Any, ...]:
    """What the codes and statistics of a run directory rest on."""
    signature = (read_identity(run) or {}).get("signature", {})
    splits = read_json(run, SPLITS) or {}
    return signature.get("model"), signature.get("numerics"), splits.get("calibration")


def read_seconds(folder: Path) -> dict[str, float]:
    """Seconds that each stage of the run in `folder` has taken so far.

    Raises:
        SourceError: the file is damaged or of another schema version.
    """
    seconds = read_json(folder, SECONDS) or {}
    if not all(isinstance(value, (int, float)) for value in seconds.values()):
        raise SourceError(
            f"{folder / SECONDS} is damaged: it holds something other than seconds.",
            fix="remove the file.",
        )
    return seconds


def read_records(folder: Path, name: str) -> list[dict[str, Any]]:
    """What `RunDirectory.append` wrote; see `RunDirectory.records`. Takes no lock."""
    return read_lines(folder / name, is_sealed=is_sealed(folder))


def is_sealed(folder: Path) -> bool:
    """Whether every record of the run has a checksum."""
    return f'"{_SEALED}": true'.encode() in (read_content(folder / IDENTITY) or b"")


def _hold(path: Path) -> FileLock:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / _LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunConflict(
            f"run directory {path} is in use by another process: one search writes at a time.",
            fix="wait for it, or give another --out.",
        ) from None
    except OSError as error:
        if is_full(error):
            raise
        raise ConfigError(
            f"run directory {path} cannot be written: {error.strerror}.",
            fix="give another --out, or mend its permissions.",
        ) from error
    return lock


def read_identity(path: Path) -> dict[str, Any] | None:
    """Signature, status and birth of the run directory at `path`, or None if it is none.

    Raises:
        SourceError: the identity is damaged or of another schema version.
    """
    identity = read_json(path, IDENTITY)
    if identity is None:
        return None
    if not isinstance(identity.get("signature"), dict) or identity.get("status") not in set(Status):
        raise _damaged_identity(path, "names no signature or no status")
    environments = identity.get("environments", [])
    if not isinstance(environments, list) or not all(isinstance(e, dict) for e in environments):
        raise _damaged_identity(path, "names environments that are none")
    return identity


def _damaged_identity(path: Path, why: str) -> SourceError:
    return SourceError(
        f"{path / IDENTITY} is damaged: it {why}.", fix="restore the file, or give another --out."
    )


def environments_of(identity: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the measurements of a run directory were made with; empty where it was not recorded."""
    return list(identity.get("environments", []))


def _set_aside(path: Path, lock: FileLock) -> FileLock:
    """Rename the earlier run and hold a new, empty directory in its place."""
    set_aside(path)
    lock.release()
    return _hold(path)


def _refuse_foreign(path: Path) -> None:
    if not path.is_dir() or (path / IDENTITY).exists():
        return
    foreign = sorted(e.name for e in path.iterdir() if e.name != _LOCK and not is_litter(e))
    if foreign:
        raise RunConflict(
            f"{path} is not empty and is no run directory (it holds {foreign[0]!r}).",
            fix="give --out a new or empty folder.",
        )


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """How a stored signature differs from the one that is wanted, in words."""
    return [
        f"{_WORDS.get(key, key)} is {found.get(key)!r} there and {wanted.get(key)!r} here"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]


def _is_other(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether the directory is another search's that ended before it measured anything.

    Raises:
        RunConflict: it is another search's, and holds what that one has measured.
    """
    differing = differences(found, wanted)
    if differing and not all(e.name in _PRELIMINARY or is_litter(e) for e in path.iterdir()):
        raise RunConflict(
            f"run directory {path} belongs to another search: {'; '.join(differing)}.",
            fix="give another --out, or start anew with --fresh (the earlier run is set aside).",
        )
    return bool(differing)


def _clear_litter(path: Path) -> None:
    """Remove what a killed process was writing, from the run directory and its own folders."""
    clear_litter(path)
    for folder in path.iterdir():
        if folder.name != CHECKPOINT and folder.is_dir() and not folder.is_symlink():
            clear_litter(folder)


def _clear(path: Path) -> None:
    for name in _PRELIMINARY - {_LOCK}:
        (path / name).unlink(missing_ok=True)
