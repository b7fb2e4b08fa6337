"""SHA-256 of weight files, as the hub and `sha256sum` give it."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def file_digests(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file's content in hex, by name."""
    return {file.name: _digest(file) for file in files}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
