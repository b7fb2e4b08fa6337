"""A file of items as a task: a question with choices, or with the one right answer."""

import gzip
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoquant.errors import ConfigError, SourceError
from autoquant.parsing import Unreadable, parse_json, read_text, why

SUFFIXES = (".jsonl", ".jsonl.gz")
LARGEST_FILE = 2**30
"""Bytes of a file of items as it is read: it is in memory whole."""

_FORM = (
    'write {"query": ..., "choices": [...], "gold": N} or {"query": ..., "answer": ...}, one a '
    "line, all of one kind."
)


@dataclass(frozen=True, slots=True)
class ItemFile:
    """The items of a file, all of one kind."""

    path: Path
    records: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str:
        """Of the task: the file's name without its ending."""
        return self.path.name.removesuffix(".gz").removesuffix(".jsonl")

    @property
    def has_choices(self) -> bool:
        return "choices" in self.records[0]


def is_item_file(name: str) -> bool:
    """Whether a task's name is that of a file of items."""
    return name.endswith(SUFFIXES)


def read_items(path: Path) -> ItemFile:
    """Read a JSONL file of items, compressed or not.

    Raises:
        ConfigError: there is no such file.
        SourceError: it cannot be read, holds no item, or a line is none.
    """
    lines = [line for line in _text(path).split("\n") if line.strip()]
    if not lines:
        raise SourceError(f"{path} holds no item.", fix=_FORM)
    records = [_record(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    if len({"choices" in record for record in records}) > 1:
        raise SourceError(f"{path} holds items with choices and items without.", fix=_FORM)
    return ItemFile(path, tuple(records))


def _text(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"the file of items {path} does not exist.", fix="check the path.")
    try:
        if path.suffix != ".gz":
            return read_text(path, most=LARGEST_FILE)
        with gzip.open(path) as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise Unreadable(f"unpacks to more than {LARGEST_FILE:,} bytes")
        return content.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, Unreadable) as error:
        reason = why(error) if isinstance(error, (OSError, Unreadable)) else f"is damaged: {error}"
        raise SourceError(
            f"the file of items {path} {reason}.", fix="pass JSONL in UTF-8, or compressed by gzip."
        ) from error


def _record(line: str, origin: str) -> Mapping[str, Any]:
    try:
        record = parse_json(line)
    except Unreadable as error:
        raise SourceError(f"{origin} {error}.", fix=_FORM) from error
    match record:
        case {"query": str(), "choices": [str(), *_] as choices, "gold": int(gold)}:
            if all(isinstance(choice, str) and choice for choice in choices):
                if 0 <= gold < len(choices):
                    return {"query": record["query"], "choices": choices, "gold": gold}
                raise SourceError(
                    f"{origin} has the gold choice {gold} of {len(choices)}; they count from 0.",
                    fix=_FORM,
                )
        case {"query": str(), "answer": str(answer)} if answer:
            return {"query": record["query"], "answer": answer}
    raise SourceError(f"{origin} is no item: {_lacks(record)}.", fix=_FORM)


def _lacks(record: Any) -> str:
    if not isinstance(record, dict):
        return "it is no JSON object"
    if "query" not in record:
        return "it has no query"
    if "choices" not in record and "answer" not in record:
        return "it has neither choices nor an answer"
    if "choices" in record and "gold" not in record:
        return "it has no gold, the number of the right choice"
    return "a value is of another kind, or empty"
