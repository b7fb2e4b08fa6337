"""The tokenizer of a model folder, or what is wrong with its files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autoquant.errors import AutoQuantError, SourceError
from autoquant.source.json_file import read_json_object

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_FILES = (
    TOKENIZER_FILE,
    _CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "vocab.json",
)
"""JSON objects that make a tokenizer, as far as they are there."""


def load_tokenizer(path: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer that transformers makes of the files in `path`.

    Raises:
        SourceError: none there, or files that are damaged or do not make one.
    """
    from transformers import AutoTokenizer

    for name in _FILES:
        if (path / name).exists():
            read_json_object(path / name)
    with tokenizer_errors(path):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
        tokenizer("a")
    return tokenizer


def require_tokenizer(path: Path) -> None:
    """Raise if the tokenizer in `path`, where there is one without code of its own, is none.

    Raises:
        SourceError: transformers would refuse it.
    """
    if not any((path / name).exists() for name in _FILES):
        return
    config = path / _CONFIG_FILE
    if not config.exists() or "auto_map" not in read_json_object(config):
        load_tokenizer(path, trust_remote_code=False)


def why_no_tokenizer(text: str) -> str | None:
    """Why the library `tokenizers` makes no tokenizer of a tokenizer.json, or None."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(text)
    except BaseException as error:
        if not _is_of_files(error):
            raise
        return f"is no tokenizer: {_reason(error)}"
    return None


@contextmanager
def tokenizer_errors(path: Path) -> Iterator[None]:
    """Turn what a tokenizer raises into an error of its files.

    Raises:
        SourceError: anything was raised that is no error of AutoQuant's own and no interruption.
    """
    try:
        yield
    except AutoQuantError:
        raise
    except BaseException as error:
        if not _is_of_files(error):
            raise
        raise SourceError(
            f"{path} has no tokenizer that transformers can use: {_reason(error)}",
            fix="put the model's own tokenizer.json and tokenizer_config.json beside its weights; "
            "pass --trust-remote-code if it comes as code.",
        ) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_of_files(error: BaseException) -> bool:
    """Whether files cause an error; a panic of Rust is no Exception to Python."""
    is_panic = type(error).__name__ == "PanicException"
    return not isinstance(error, MemoryError) and (isinstance(error, Exception) or is_panic)
