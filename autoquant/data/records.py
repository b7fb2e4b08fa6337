"""Text of records: of the lines of a JSONL file, of a JSON array, of the rows of a data set."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoquant.data.chat import Conversation, content_text
from autoquant.errors import SourceError
from autoquant.parsing import Unreadable, parse_json


def read_records(path: Path, text: str) -> Iterator[str | Conversation]:
    """Yield the documents of JSON objects: one a line, all in one array, or a single one.

    An object may hold the array, as `{"version": ..., "data": [...]}` does.

    Args:
        path: of the file, for messages.
        text: what it holds.

    Raises:
        SourceError: no JSON, or a record without text; names the place.
    """
    records = _one_value(text)
    if records is not None:
        for number, record in enumerate(records, start=1):
            yield document(record, f"{path} record {number}")
        return
    # Strings of a record may hold any other line separator of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield document(_parse_line(path, number, line), f"{path}:{number}")


def document(record: Any, origin: str) -> str | Conversation:
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
        fix='write {"text": ...} or {"messages": [{"role": ..., "content": ...}]}.',
    )


def _one_value(text: str) -> list[Any] | None:
    """The records of a file that is a single array or object, or None: it has one a line."""
    first_line, _, rest = text.strip().partition("\n")
    is_object = first_line.startswith("{") and not (rest and first_line.rstrip().endswith("}"))
    if not first_line.startswith("[") and not is_object:
        return None
    try:
        value = parse_json(text)
    except Unreadable:
        return None
    if isinstance(value, list):
        return value
    return _held(value) or ([value] if rest else None)


def _held(value: dict[str, Any]) -> list[Any]:
    """The array that an object holds which is no record itself; empty if there is none.

    Either its texts (`{"text": [...]}`), or its only array of objects.
    """
    texts = value.get("text")
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return texts
    if isinstance(texts, str) or "messages" in value or Conversation.of(value) is not None:
        return []
    arrays = [own for own in value.values() if isinstance(own, list) and own]
    records = [own for own in arrays if all(isinstance(record, dict) for record in own)]
    return records[0] if len(records) == 1 else []


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return parse_json(line)
    except Unreadable as error:
        raise SourceError(
            f"{path}:{number} {error}.",
            fix="write one JSON object per line (JSONL), or one JSON array of objects.",
        ) from error
