"""JSON files of a checkpoint folder."""

from pathlib import Path
from typing import Any

from autoquant.errors import SourceError
from autoquant.parsing import Unreadable, parse_json, read_text, why


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that `path` holds.

    Raises:
        SourceError: missing, unreadable, or not a JSON object.
    """
    try:
        data = parse_json(read_text(path))
    except (OSError, Unreadable) as error:
        raise SourceError(
            f"{path} {why(error)}.",
            fix="pass a complete model folder, or download the file again.",
        ) from error
    if not isinstance(data, dict):
        raise SourceError(f"{path} is not a JSON object.", fix="download the file again.")
    return data
