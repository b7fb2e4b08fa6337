"""What lies in a checkpoint folder: files of its own, each of which can be read to its end."""

import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from autoquant.errors import SourceError

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".ot")
"""Endings of files that hold weights by one name and anything else by another: voices, words."""

_NAMES = ("pytorch_model", "model", "consolidated", "tf_model", "flax_model", "rust_model")
_OF_TRAINING = ("optimizer", "scheduler", "rng_state", "training_args")
_OTHER_KINDS = (".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")

OTHER_FORMS = (
    *(f"{name}*{ending}" for name in (*_NAMES, *_OF_TRAINING) for ending in _PICKLED),
    *(f"*{ending}" for ending in _OTHER_KINDS),
)
"""Names of files that hold the weights in another form, or the state of their training."""

_LARGEST_COMPANION = 2**28
"""Bytes of a pickled file of another name, from which on it is taken for weights."""


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
        if not holds_weights_by_name(path):
            require_own(folder, path)


def holds_weights_by_name(path: Path) -> bool:
    """Whether a file's name, or a pickled file's size, is that of weights.

    Nothing reads such files but those that the checkpoint consists of.
    """
    if path.suffix == ".safetensors" or any(fnmatchcase(path.name, own) for own in OTHER_FORMS):
        return True
    is_pickled = path.suffix in _PICKLED and path.is_file()
    return is_pickled and path.stat().st_size > _LARGEST_COMPANION


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
            f"{path} is a folder, a pipe, a socket or a device, and no file.",
            fix="remove it from the model.",
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
