"""The files beside the weights: tokenizer, chat template, generation config, remote code."""

import os
from collections.abc import Iterator
from pathlib import Path

from autoquant.errors import SourceError
from autoquant.source.shards import stays_inside

_OTHER_WEIGHTS = {
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
_REWRITTEN = {"config.json", "model.safetensors.index.json", "README.md", "hf_quant_config.json"}


def companion_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files to copy as they are and files to leave out, relative to `folder`.

    Left out are weights: those that the export rewrites, and other forms of the same weights. Files
    that the export writes itself, and hidden files, are in neither list.

    Raises:
        SourceError: a file is a link that leaves the folder, or a folder is a link.
    """
    copied, left_out = [], []
    for path in _files(folder):
        name = path.relative_to(folder)
        if str(name) in _REWRITTEN:
            continue
        if path.suffix in _OTHER_WEIGHTS or path.name.endswith(".index.json"):
            left_out.append(name)
            continue
        if not stays_inside(folder, path):
            raise SourceError(
                f"{path} is a link to {path.resolve()}, outside of the model.",
                fix="replace the link by the file, or remove it.",
            )
        copied.append(name)
    return copied, left_out


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                raise SourceError(
                    f"{path} is a link to the folder {path.resolve()}.",
                    fix="replace the link by the folder, or remove it.",
                )
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))
