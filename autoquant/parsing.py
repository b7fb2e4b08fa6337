"""JSON and YAML that strangers wrote, read within limits of size, depth and meaning."""

import json
import os
import re
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yaml.nodes import Node

LARGEST_TEXT = 64 * 2**20
"""Bytes of a JSON file; an index of 100,000 tensors has a sixth of it, and every nested list of
three bytes takes seventy in memory."""

LARGEST_YAML = 2 * 2**20
"""Bytes of a YAML file: PyYAML reads as much in three seconds."""

DEEPEST = 128
"""Levels of nesting; the limit of serde_json, which engines and tokenizers read the same files
with."""

MOST_NODES = 500_000
"""Values of a YAML file once every alias is replaced by what it stands for."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NO_CHARACTER = "half of a surrogate pair, which is no character"


class Unreadable(ValueError):
    """Text that is not what it should be; the message goes on where the file's name ended."""


def why(error: Exception) -> str:
    """What an `OSError` or an `Unreadable` says of a file, to go on after its name."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error)


def read_text(path: Path, *, most: int = LARGEST_TEXT) -> str:
    """The content of a UTF-8 file.

    Raises:
        OSError: it cannot be read.
        Unreadable: as `read_bytes`, or not UTF-8.
    """
    return decode(read_bytes(path, most=most))


def read_bytes(path: Path, *, most: int) -> bytes:
    """The content of a file.

    Raises:
        OSError: it cannot be read.
        Unreadable: no regular file (a pipe would be waited for), or larger than `most` bytes.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise Unreadable("is no regular file")
        if found.st_size > most:
            raise Unreadable(f"is larger than {most:,} bytes")
        return file.read()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def decode(content: bytes) -> str:
    """UTF-8 as text; a byte order mark stays a character.

    Raises:
        Unreadable: not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"is not UTF-8 from byte {error.start} on") from None


def parse_json(text: str, **hooks: Any) -> Any:
    """The value of a JSON text.

    Args:
        text: JSON; `NaN` and `Infinity`, which Python writes, are taken.
        hooks: of `json.loads`, such as `object_pairs_hook`.

    Raises:
        Unreadable: not JSON, nested deeper than `DEEPEST`, an integer of thousands of digits, or a
            string with half of a surrogate pair, which is no text.
    """
    try:
        value = json.loads(text, **hooks)
    except Unreadable:
        raise
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text else ""
        place = f"{line}column {error.colno}"
        raise Unreadable(f"is not JSON: {error.msg} at {place}") from None
    except ValueError:  # an integer beyond sys.get_int_max_str_digits()
        raise Unreadable("holds an integer of thousands of digits") from None
    _require_shallow(value)
    if _SURROGATE.search(text) and not _is_text(value):
        raise Unreadable(f"holds {_NO_CHARACTER}")
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: mappings, lists, strings, numbers, booleans and nulls.

    Dates stay the strings that they are written as.

    Raises:
        Unreadable: not YAML, a tag or a key that stands for anything else, a key twice in a
            mapping, nested deeper than `DEEPEST`, or aliases that multiply to more than
            `MOST_NODES` values.
    """
    import yaml

    if len(text) > LARGEST_YAML:
        raise Unreadable(f"is larger than {LARGEST_YAML:,} characters")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {}, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except Unreadable:
        raise
    except RecursionError:
        raise _too_deep() from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise Unreadable(f"is not YAML: {error.problem or error.context}{place}") from None
    except Exception as error:  # PyYAML's constructors raise anything on a scalar of a wrong form
        raise Unreadable(f"is not YAML: {' '.join(str(error).split())}") from None


def _require_shallow(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise _too_deep()


def _is_text(value: Any) -> bool:
    """Whether every string can be encoded."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _count(node: "Node", sizes: dict[int, int], depth: int) -> int:
    """Values below `node` with every alias replaced by what it stands for; dates become strings.

    Raises:
        Unreadable: too many or too deep, a node inside itself, or a key twice in a mapping.
    """
    from yaml.nodes import MappingNode, ScalarNode

    known = sizes.get(id(node))
    if known is not None:
        if known == 0:
            raise Unreadable(
                f"has an alias that stands for itself, at line {node.start_mark.line + 1}"
            )
        return known
    if depth > DEEPEST:
        raise _too_deep()
    sizes[id(node)] = 0  # not finished
    if isinstance(node, ScalarNode):
        size = 1
        if not _is_text(node.value):
            raise Unreadable(f"holds {_NO_CHARACTER}, at line {node.start_mark.line + 1}")
        if node.tag == "tag:yaml.org,2002:timestamp" and node.style is None:
            node.tag = "tag:yaml.org,2002:str"
    elif isinstance(node, MappingNode):
        _require_different_keys(node)
        size = 1 + sum(_count(part, sizes, depth + 1) for pair in node.value for part in pair)
    else:
        size = 1 + sum(_count(part, sizes, depth + 1) for part in node.value)
    if size > MOST_NODES:
        raise Unreadable(f"has aliases that stand for more than {MOST_NODES:,} values")
    sizes[id(node)] = size
    return size


def _require_different_keys(node: "Node") -> None:
    seen: set[Hashable] = set()
    for key, _ in node.value:
        if isinstance(key.value, str) and (key.tag, key.value) in seen:
            raise Unreadable(f"has {key.value!r} twice, again at line {key.start_mark.line + 1}")
        seen.add((key.tag, key.value) if isinstance(key.value, str) else id(key))


def _too_deep() -> Unreadable:
    return Unreadable(f"is nested deeper than {DEEPEST} levels")
