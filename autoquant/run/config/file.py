"""Settings files: YAML, one setting a line, as `config.resolved.yaml` of a run is one."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from autoquant.errors import ConfigError
from autoquant.parsing import Unreadable, parse_yaml, read_text, why
from autoquant.run.config.base import SCHEMA_VERSION, Config


def read_settings(path: Path, kind: type[Config]) -> dict[str, Any]:
    """The settings that the file gives, unchecked; a key without a value gives none.

    Raises:
        ConfigError: the file cannot be read, is no mapping, is of another schema version, or holds
            what is not a setting of the command.
    """
    settings = _read_mapping(path)
    version = settings.pop("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema_version {version!r}, this version reads {SCHEMA_VERSION}.",
            fix=f"set schema_version: {SCHEMA_VERSION} after checking the file.",
        )
    known = [name for name, field in kind.settings().items() if field.setting.is_saved]
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"{path}: {key!r} is not a setting of `{kind.command}`.", fix=_nearest(key, known)
            )
    return {key: value for key, value in settings.items() if value is not None}


def settings_text(config: Config) -> str:
    """The settings in force as a file that reads back to them."""
    return yaml.safe_dump(config.saved(), sort_keys=False)


def _read_mapping(path: Path) -> dict[str, Any]:
    way_out = "write YAML, one `setting: value` a line."
    try:
        settings = parse_yaml(read_text(path))
    except (OSError, Unreadable) as error:
        raise ConfigError(f"configuration {path} {why(error)}.", fix=way_out) from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(
            f"configuration {path} holds a {type(settings).__name__}, not a mapping.", fix=way_out
        )
    return {str(key): value for key, value in settings.items()}


def _nearest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return f"write {close[0]!r}." if close else f"settings are: {', '.join(sorted(known))}."
