"""JSON files of a checkpoint folder."""

import json
from pathlib import Path
from typing import Any

from autoquant.errors import SourceError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that `path` holds.

    Raises:
        SourceError: missing, unreadable, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read: {error.strerror or error}.",
            fix="pass a complete model folder, or download the file again.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} is not JSON: {error}.", fix="download the file again."
        ) from error
    if not isinstance(data, dict):
        raise SourceError(f"{path} is not a JSON object.", fix="download the file again.")
    return data
