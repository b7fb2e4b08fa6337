"""The files beside the weights: tokenizer, chat template, generation config, remote code."""

from pathlib import Path

from autoquant.source.folder import OTHER_WEIGHTS, files_of, require_own

_REWRITTEN = {"config.json", "model.safetensors.index.json", "README.md", "hf_quant_config.json"}


def companion_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files to copy as they are and files to leave out, relative to `folder`.

    Left out are weights: those that the export rewrites, and other forms of the same weights. Files
    that the export writes itself, and hidden files, are in neither list.

    Raises:
        SourceError: a file is none of the folder's own, or cannot be read; a folder is a link.
    """
    copied, left_out = [], []
    for path in files_of(folder):
        name = path.relative_to(folder)
        if str(name) in _REWRITTEN:
            continue
        if path.suffix in OTHER_WEIGHTS or path.name.endswith(".index.json"):
            left_out.append(name)
            continue
        require_own(folder, path)
        copied.append(name)
    return copied, left_out
