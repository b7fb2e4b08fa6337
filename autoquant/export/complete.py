"""Whether an exported checkpoint is still all there, told without reading its weights."""

from pathlib import Path

from autoquant.errors import SourceError
from autoquant.export.companions import AUTOQUANT_FILE
from autoquant.source.json_file import read_json_object
from autoquant.source.shards import read_checkpoint_headers
from autoquant.source.source import CONFIG_FILE


def why_incomplete(folder: Path) -> str | None:
    """What is missing or damaged in `folder` as far as its JSON files and headers tell, or None."""
    try:
        read_json_object(folder / CONFIG_FILE)
        said = read_json_object(folder / AUTOQUANT_FILE).get("checkpoint_bytes")
        found = read_checkpoint_headers(folder).bytes
    except SourceError as error:
        return error.message
    if said != found:
        return f"{folder / AUTOQUANT_FILE} says {said} bytes, and the tensors have {found}."
    return None
