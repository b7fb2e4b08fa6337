"""Where calibration text comes from: the standard library, a file, a folder, or the hub."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autoquant.data import stdlib
from autoquant.data.chat import Conversation
from autoquant.data.hub import MIXTURE, PARTS, data_set_documents, mixture_documents
from autoquant.data.records import read_records
from autoquant.errors import SourceError
from autoquant.parsing import Unreadable, read_text, why

STDLIB = "stdlib"
"""Name of the bundled model's source: held-out modules of the interpreter's standard library."""

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
        calibration: `stdlib`, `mixture`, a file of text, JSONL or JSON, a folder of those, or a
            `datasets` id with an optional split: `org/name` or `org/name:split`.

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
    elif calibration == MIXTURE:
        documents = tuple(mixture_documents())
    elif path.is_dir():
        documents = tuple(text for file in _files(path) for text in _read_file(file))
    elif path.is_file():
        documents = tuple(_read_file(path))
    else:
        documents = tuple(data_set_documents(calibration))
    documents = tuple(d for d in documents if not isinstance(d, str) or d.strip())
    if not documents:
        raise SourceError(
            f"calibration {calibration!r} holds no text.",
            fix=f"pass a file or folder of {', '.join(TEXT_SUFFIXES + RECORD_SUFFIXES)}.",
        )
    return Corpus(name=calibration, documents=documents)


def text_title(calibration: str) -> str:
    """What a reader is told that the text is."""
    if calibration != MIXTURE:
        return calibration
    return f"a mixture of {', '.join(part.name for part in PARTS)}"


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
    if path.suffix in RECORD_SUFFIXES:
        yield from read_records(path, text)
    else:
        yield text
