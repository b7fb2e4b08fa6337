"""What lies in a checkpoint folder: files of its own, each of which can be read to its end."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from autoquant.errors import SourceError

OTHER_WEIGHTS = frozenset(
    {
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".h5",
        ".msgpack",
        ".onnx",
        ".onnx_data",
    }
)
"""Endings of files with weights, which nothing reads but those that the checkpoint consists of."""


def files_of(folder: Path) -> Iterator[Path]:
    """Every file below `folder` in a fixed order; hidden files and folders are left out.

    Raises:
        SourceError: a folder is a link, or cannot be listed.
    """
    for parent, folders, files in os.walk(folder, onerror=_raise_unlisted):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                raise SourceError(
                    f"{path} is a link to the folder {os.path.realpath(path)}.",
                    fix="replace the link by the folder, or remove it.",
                )
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def require_own_files(folder: Path) -> None:
    """Raise now if a file beside the weights cannot be copied into a checkpoint later.

    Raises:
        SourceError: as `files_of` and `require_own`.
    """
    for path in files_of(folder):
        if path.suffix not in OTHER_WEIGHTS:
            require_own(folder, path)


def require_own(folder: Path, path: Path) -> None:
    """Return if `path` is a readable file of the checkpoint in `folder`.

    Raises:
        SourceError: a link that leaves the folder or leads nowhere, a pipe, a socket, a device, or
            a file that this user may not read.
    """
    if not stays_inside(folder, path):
        raise SourceError(
            f"{path} is a link to {os.path.realpath(path)}, outside of the model.",
            fix="replace the link by the file, or remove it.",
        )
    try:
        mode = path.stat().st_mode
    except OSError as error:  # a link to itself or to nothing
        raise SourceError(
            f"{path} cannot be read: {error.strerror}.", fix="replace the file, or remove it."
        ) from error
    if not stat.S_ISREG(mode):
        raise SourceError(
            f"{path} is a pipe, a socket or a device, and no file.", fix="remove it from the model."
        )
    if not os.access(path, os.R_OK):
        raise SourceError(
            f"{path} cannot be read: you have no permission to.", fix="mend its permissions."
        )


def stays_inside(folder: Path, path: Path) -> bool:
    """Whether `path`, links resolved, is in `folder` or in the blobs of its cache entry."""
    own = Path(os.path.realpath(folder))
    roots = [own]
    if own.parent.name == "snapshots":
        roots.append(own.parent.parent / "blobs")
    resolved = Path(os.path.realpath(path))  # Path.resolve() raises on a link to itself
    return any(resolved.is_relative_to(root) for root in roots)


def _raise_unlisted(error: OSError) -> None:
    raise SourceError(
        f"the folder {error.filename} cannot be listed: {error.strerror}.",
        fix="mend its permissions, or remove it.",
    ) from error
