"""A folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from autoquant.errors import ConfigError, RunConflict
from autoquant.files import (
    MARK,
    clear_litter,
    is_full,
    is_litter,
    sync_folder,
    temporary,
    unfinished_folder,
)


@contextmanager
def new_folder(target: Path, *, source: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which takes its place when the block ends well.

    What an export that was killed has left behind is removed; on an error nothing is left. The
    mark that makes a leftover ours stays until `target` is complete.

    Raises:
        ConfigError: `target` is inside `source` or holds it, or cannot be written.
        RunConflict: `target` holds something, or another process is writing it.
    """
    target = target.absolute()
    require_free(target, source=source)
    workplace = unfinished_folder(target)
    _require_ours(workplace)
    workplace.mkdir(parents=True, exist_ok=True)
    lock = FileLock(workplace / MARK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunConflict(
            f"another export is writing {target}.", fix="wait for it, or name another folder."
        ) from None
    try:
        _clear(workplace)
        _require_empty(target)
        folder = workplace / "checkpoint"
        folder.mkdir()
        yield folder
        for parent, _, _ in os.walk(folder, topdown=False):
            sync_folder(Path(parent))
        if target.is_dir():
            target.rmdir()
        os.rename(folder, target)
        sync_folder(target.parent)
    finally:
        _clear(workplace)
        (workplace / MARK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # another export has come in between
            workplace.rmdir()


def require_free(target: Path, *, source: Path) -> None:
    """Raise unless `target` is a folder that may be written: new or empty, apart from the source.

    Raises:
        ConfigError: `target` is inside `source` or holds it.
        RunConflict: `target` holds something.
    """
    _require_apart(target, source)
    if target.absolute().parent.is_dir():
        clear_litter(target.absolute().parent)
    _require_empty(target)
    _require_writable(target)


def _require_empty(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise RunConflict(
            f"{target.absolute()} exists and holds something.",
            fix="name a new folder, or remove this one.",
        )


def _require_writable(target: Path) -> None:
    """Raise before any work is done if the folder that will hold `target` cannot be made."""
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    probe = temporary(parent / target.name)
    try:
        probe.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another thread looks at the same time
            probe.rmdir()
    except OSError as error:
        if is_full(error):
            raise
        raise ConfigError(
            f"{target.absolute()} cannot be written: {error.strerror}.",
            fix="name a folder on a disk that you may write to.",
        ) from error


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file and wait until the disk holds it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())


def _require_apart(target: Path, source: Path) -> None:
    one, other = target.resolve(), source.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise ConfigError(
            f"the checkpoint {target} and the model {source} would share a folder.",
            fix="name a folder apart from the model; nothing is ever written to a source.",
        )


def _require_ours(workplace: Path) -> None:
    if workplace.exists() and not is_litter(workplace):
        raise RunConflict(
            f"{workplace} exists and is not from AutoQuant.",
            fix="move it away, or export elsewhere.",
        )


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != MARK:
            entry.unlink()
