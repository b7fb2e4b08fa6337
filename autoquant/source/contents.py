"""SHA-256 of weight files, each read once and remembered.

Reading every byte of a large model takes minutes. So the digest of a file is kept in the user's
cache, under its path, size, modification time and inode: a file that agrees in all of them is taken
for the one that was read, also where a tool has set the time of other content back. Files of the
Hugging Face cache need no reading: they are links to blobs that are named after their SHA-256.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from autoquant.errors import SourceError
from autoquant.files import to_json, write_atomic
from autoquant.progress import Progress, Unit

CACHE_VARIABLE = "AUTOQUANT_CACHE"

_BLOCK_BYTES = 1 << 23
_TOLD_BYTES = 1 << 30
"""Reading less is no stage of its own: it takes about a second."""

_SETTLED_NS = 2_000_000_000
"""Age of a change, in nanoseconds, from which on a further one shows in the modification time,
whose clock moves in steps of up to two seconds on some file systems."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Contents:
    """What the weight files of a checkpoint hold, byte for byte.

    Args:
        files: of one checkpoint.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._digests: dict[Path, str] = {}

    def digests(self, progress: Progress | None = None) -> Mapping[str, str]:
        """SHA-256 of each file in hex, by its name; files that are not known yet are read.

        Args:
            progress: told of a stage `hash` in bytes, where there is much to read.

        Raises:
            SourceError: a file cannot be read, or changes meanwhile.
        """
        unknown = {file: _size(file) for file in self._files if not self._is_known(file)}
        size = sum(unknown.values())
        told = progress if size >= _TOLD_BYTES else None
        if told is not None:
            told.stage("hash", size, Unit.BYTES)
        for file in unknown:
            self._digests[file] = _read(file, None if told is None else told.step)
        return {file.name: self._digests[file] for file in self._files}

    def _is_known(self, file: Path) -> bool:
        if file not in self._digests:
            known = _blob_digest(file) or _remembered(file)
            if known is not None:
                self._digests[file] = known
        return file in self._digests


def sha256(file: Path, step: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file's content in hex, as the hub and `sha256sum` give it.

    Args:
        file: is read from beginning to end.
        step: called with the number of bytes that have just been read.
    """
    content, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            content.update(block[:count])
            if step is not None:
                step(count)
    return content.hexdigest()


def file_digests(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file's content in hex, by name; every file is read."""
    return {file.name: sha256(file) for file in files}


def cache_folder() -> Path:
    """Where digests are kept: `$AUTOQUANT_CACHE`, else `autoquant` in the user's cache."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoquant"


def _read(file: Path, step: Callable[[int], object] | None) -> str:
    """The digest of a file, which is remembered."""
    with _reading(file):
        before, now = _identity(file), time.time_ns()
        digest = sha256(file, step)
        is_same = _identity(file) == before
    if not is_same:
        raise SourceError(
            f"{file} has changed while it was read.",
            fix="wait until whatever writes it is done.",
        )
    if now - int(before["mtime_ns"]) >= _SETTLED_NS:
        _remember(file, {**before, "sha256": digest})
    return digest


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"{file} cannot be read: {error.strerror or error}.",
            fix="check the path, its permissions and the disk.",
        ) from error


def _size(file: Path) -> int:
    with _reading(file):
        return file.stat().st_size


def _blob_digest(file: Path) -> str | None:
    """The SHA-256 by which the hub's cache names a blob, unless that was edited in place.

    A blob is complete before the first link to it is made, so a later change is an edit.
    """
    blob = file.resolve()
    if not file.is_symlink() or blob.parent.name != "blobs" or not _SHA256.fullmatch(blob.name):
        return None
    with _reading(file):
        is_original = blob.stat().st_mtime_ns <= file.lstat().st_mtime_ns
    return blob.name if is_original else None


def _identity(file: Path) -> dict[str, str | int]:
    """What tells a file from another, or from an earlier state of itself, without reading it."""
    path, found = file.resolve(), file.stat()
    return {
        "path": str(path),
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "inode": found.st_ino,
    }


def _entry(file: Path) -> Path:
    name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()
    return cache_folder() / "contents" / f"{name}.json"


def _remembered(file: Path) -> str | None:
    """The digest that was found when the file was read last, if it has not changed since."""
    try:
        entry = json.loads(_entry(file).read_text(encoding="utf-8"))
        digest = entry.pop("sha256")
        is_same = entry == _identity(file) and _SHA256.fullmatch(digest) is not None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):  # none, or damaged
        return None
    return digest if is_same else None


def _remember(file: Path, entry: Mapping[str, str | int]) -> None:
    """Keep a digest; a cache that cannot be written costs time and nothing else."""
    target = _entry(file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, to_json(entry))
    except OSError:
        return
