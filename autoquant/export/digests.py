"""SHA-256 of weight files, as the hub and `sha256sum` give it."""

from collections.abc import Iterable
from pathlib import Path

from autoquant.source.contents import sha256


def file_digests(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file's content in hex, by name; every file is read."""
    return {file.name: sha256(file) for file in files}
