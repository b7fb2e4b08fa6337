"""The files beside the weights: tokenizer, chat template, generation config, remote code."""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from autoquant.data.templates import why_no_template
from autoquant.data.tokenizer import TOKENIZER_FILE, why_no_tokenizer
from autoquant.errors import SourceError
from autoquant.parsing import Unreadable, parse_json, read_text, why
from autoquant.source.folder import files_of, holds_weights_by_name, require_own
from autoquant.source.shards import INDEX_FILE

AUTOQUANT_FILE = "autoquant.json"
_REWRITTEN = {
    "config.json",
    INDEX_FILE,
    "README.md",
    "hf_quant_config.json",
    AUTOQUANT_FILE,
}
_LISTED = 8
"""Names in one note."""

_TEMPLATE = ".jinja"
_READ_BY_SERVERS = re.compile(
    r"(additional_chat_templates/|chat_template).*"
    r"|(tokenizer|vocab|merges|special_tokens_map|added_tokens)[^/]*"
    r"|(.*_)?(generation|processor|preprocessor|adapter)_config\.json"
    r"|.*\.(py|model)"
)
"""What transformers or an engine reads of a folder without being told of it."""


def companion_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files to copy as they are and files to leave out, relative to `folder`.

    Left out are weights: those that the export rewrites, other forms of the same weights, and those
    that no index names. Files that the export writes itself, and hidden files, are in neither list.

    Raises:
        SourceError: a file is none of the folder's own, or cannot be read; a folder is a link.
    """
    copied, left_out = [], []
    for path in files_of(folder):
        name = path.relative_to(folder)
        if str(name) in _REWRITTEN:
            continue
        if holds_weights_by_name(path) or path.name.endswith(".index.json"):
            left_out.append(name)
            continue
        require_own(folder, path)
        copied.append(name)
    return copied, left_out


def require_sound_companions(folder: Path) -> None:
    """Raise before a search or an export begins if no server could read what comes with a model.

    Raises:
        SourceError: as `companion_files`, or a file is broken.
    """
    for name in companion_files(folder)[0]:
        reason = _why_broken(folder, name)
        if reason is not None:
            raise SourceError(
                f"{folder / name} {reason}: no server can read it.",
                fix="download the file again, or remove it.",
            )


def left_out_note(files: Sequence[Path]) -> str | None:
    """What to tell the user of files that a checkpoint lacks, or None where it lacks none."""
    if not files:
        return None
    named = ", ".join(map(str, files[:_LISTED]))
    more = f" and {len(files) - _LISTED} more" if len(files) > _LISTED else ""
    return (
        f"left out of the checkpoint: {named}{more}. These hold the weights in another form, or "
        "weights that the index does not name, which engines do not load either."
    )


def companion_problems(
    checkpoint: Path, weights: Collection[Path], source: Path | None
) -> Iterator[str]:
    """Files beside a checkpoint's weights that are broken or, with a source, not its own.

    Args:
        checkpoint: a folder that an export has written.
        weights: its weight files.
        source: the folder of the model that it was made from.
    """
    try:
        found, left_out = companion_files(checkpoint)
        expected = None if source is None else set(companion_files(source)[0])
    except SourceError as error:
        yield error.message
        return
    for name in found:
        reason = _why_broken(checkpoint, name)
        if reason is not None:
            yield f"{name} {reason}."
    for name in left_out:  # engines read every one where no index names them
        is_read = name.suffix == ".safetensors" and not (checkpoint / INDEX_FILE).exists()
        if is_read and len(name.parts) == 1 and checkpoint / name not in weights:
            yield f"{name} is not of the checkpoint, and engines read its tensors too."
    if source is None or expected is None:
        return
    for name in sorted(expected - set(found)):
        yield f"{name} of the source is missing."
    for name in found:
        if name in expected:
            if not _same_content(checkpoint / name, source / name):
                yield f"{name} differs from the source's."
        elif _READ_BY_SERVERS.fullmatch(name.as_posix()):
            yield f"{name} is not in the source, and servers read it."


def _why_broken(folder: Path, name: Path) -> str | None:
    """Why no server can read a file, to go on after its name; None where none reads it as text."""
    path = folder / name
    is_text = path.suffix in (".json", _TEMPLATE)
    if not is_text or not _READ_BY_SERVERS.fullmatch(name.as_posix()):
        return None
    try:
        text = read_text(path)
        if path.suffix == _TEMPLATE:
            return why_no_template(text)
        content = parse_json(text)
    except (OSError, Unreadable) as error:
        return why(error)
    if path.name == TOKENIZER_FILE:
        return why_no_tokenizer(text)
    template = content.get("chat_template") if isinstance(content, dict) else None
    return why_no_template(template) if isinstance(template, str) else None


def _same_content(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        while piece := first.read(1 << 20):
            if piece != second.read(1 << 20):
                return False
    return True
