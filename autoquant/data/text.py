"""Where calibration text comes from: the standard library, a file, a folder, or a `datasets` id."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from autoquant.data import stdlib
from autoquant.data.chat import Conversation, content_text
from autoquant.errors import SourceError
from autoquant.parsing import Unreadable, parse_json, read_text, why

STDLIB = "stdlib"
"""Name of the default source: held-out modules of the running interpreter's standard library."""

MAX_DOCUMENTS = 100_000
"""Documents taken from a streamed hub data set: far more than any search reads."""

LARGEST_FILE = 2**32
"""Bytes of a file of text: it is read into memory whole."""

TEXT_SUFFIXES = (".txt", ".md", ".py", ".raw", ".utf8", ".text")
RECORD_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents in a fixed order."""

    name: str
    documents: tuple[str | Conversation, ...]


def load_corpus(calibration: str = STDLIB) -> Corpus:
    """Read the documents of `calibration`.

    Args:
        calibration: `stdlib`, a text or JSONL file, a folder of those, or a `datasets` id with an
            optional split: `org/name` or `org/name:split`.

    Raises:
        SourceError: nothing there, unreadable, or without text.
    """
    path = Path(calibration)
    if not calibration.strip():
        raise SourceError(
            "the name of the calibration text is empty.",
            fix=f"pass {STDLIB}, a file, a folder or a data set id.",
        )
    documents: tuple[str | Conversation, ...]
    if calibration == STDLIB:
        documents = tuple(text for _, text in stdlib.held_out_documents())
    elif path.is_dir():
        documents = tuple(text for file in _files(path) for text in _read_file(file))
    elif path.is_file():
        documents = tuple(_read_file(path))
    else:
        documents = tuple(_read_hub(calibration))
    documents = tuple(d for d in documents if not isinstance(d, str) or d.strip())
    if not documents:
        raise SourceError(
            f"calibration {calibration!r} holds no text.",
            fix=f"pass a file or folder of {', '.join(TEXT_SUFFIXES + RECORD_SUFFIXES)}.",
        )
    return Corpus(name=calibration, documents=documents)


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in TEXT_SUFFIXES + RECORD_SUFFIXES and path.is_file()
    )


def _read_file(path: Path) -> Iterator[str | Conversation]:
    try:
        text = read_text(path, most=LARGEST_FILE).removeprefix("\ufeff")
    except (OSError, Unreadable) as error:
        raise SourceError(
            f"calibration file {path} {why(error)}.",
            fix="convert it to UTF-8 or pass another file.",
        ) from error
    if path.suffix not in RECORD_SUFFIXES:
        yield text
        return
    # Strings of a record may hold any other line separator of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _document(_parse_line(path, number, line), f"{path}:{number}")


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return parse_json(line)
    except Unreadable as error:
        raise SourceError(
            f"{path}:{number} {error}.", fix="write one JSON object per line (JSONL)."
        ) from error


def _document(record: Any, origin: str) -> str | Conversation:
    """What a record holds: a conversation, `text`, or all its strings in order."""
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        conversation = Conversation.of(record)
        if conversation is not None:
            return conversation
        if isinstance(record.get("text"), str):
            return str(record["text"])
        if isinstance(record.get("messages"), list):
            turns = (t.get("content") if isinstance(t, dict) else t for t in record["messages"])
            return "\n".join(map(content_text, turns))
        strings = [value for value in record.values() if isinstance(value, str)]
        if strings:
            return "\n".join(strings)
    raise SourceError(
        f"{origin} has no text field.",
        fix='write {"text": ...} or {"messages": [{"role": ..., "content": ...}]} per line.',
    )


def _read_hub(calibration: str) -> Iterator[str | Conversation]:
    name, _, split = calibration.partition(":")
    try:
        from datasets import load_dataset

        rows = load_dataset(name, split=split or "train", streaming=True)
        for number, record in enumerate(islice(rows, MAX_DOCUMENTS)):
            yield _document(record, f"{calibration} row {number}")
    except SourceError:
        raise
    except Exception as error:  # the hub client raises a dozen unrelated types
        summary = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"calibration {calibration!r} is no file or folder here, and loading it as a data set "
            f"failed: {summary}",
            fix="check the path, or pass a data set id as org/name:split with the hub reachable.",
        ) from error
