"""JSON and YAML of strangers: what is taken, and what is said of the rest."""

import json
import os
from pathlib import Path

import pytest

from autoquant.errors import LONGEST_LINE, SourceError
from autoquant.parsing import (
    DEEPEST,
    LARGEST_YAML,
    Unreadable,
    parse_json,
    parse_yaml,
    read_text,
)

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * [f'*{before}'])}]\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
MERGED_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(9 * [f'*{before}'])}]}}\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", r"is not JSON: .* at column 2"),
        ('{\n"a": nul}', r"is not JSON: .* at line 2 column 6"),
        ('"\\ud800"', "holds half of a surrogate pair"),
        ('{"\\udc00x": 1}', "holds half of a surrogate pair"),
        ("9" * 5000, "holds an integer of thousands of digits"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "is nested deeper than 128 levels"),
        ("[" * 200_000, "is nested deeper than 128 levels"),
    ],
)
def test_json_that_nobody_should_read_is_refused(text, reason):
    with pytest.raises(Unreadable, match=reason):
        parse_json(text)


@pytest.mark.parametrize(
    "value", [None, 7, "\U0001f600", [{"a": [1.5, True]}], "x" * 10_000, {"deep": [[[[]]]]}]
)
def test_other_json_is_read_as_it_is(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False)) == value


def test_json_may_be_as_deep_as_the_limit():
    text = "[" * DEEPEST + "]" * DEEPEST
    assert json.dumps(parse_json(text)) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "has aliases that stand for more than 500,000 values"),
        (MERGED_BOMB, "has aliases that stand for more than 500,000 values"),
        ("&a [*a]", "has an alias that stands for itself, at line 1"),
        ("a: &a\n  b: *a", "has an alias that stands for itself, at line 1"),
        ("a: 1\nb: 2\na: 3", "has 'a' twice, again at line 3"),
        ("[" * 100_000, "is nested deeper than 128 levels"),
        ("- " * 300 + "x", "is nested deeper than 128 levels"),
        ('a: "\\ud800"', "holds half of a surrogate pair"),
        ("a: \x07", "is not YAML"),
        ("a: 1: 2", r"is not YAML: .* at line 1 column 5"),
        ("a: [1", "is not YAML"),
        ("a: !!float x", "is not YAML"),
        ("a: !!bool x", "is not YAML"),
        ("a: !!python/object:os.system x", "is not YAML"),
        ("? [a]\n: b", "is not YAML"),
        (f"a: {'9' * 5000}", "is not YAML"),
        ("x" * (LARGEST_YAML + 1), "is larger than"),
    ],
)
def test_yaml_that_nobody_should_read_is_refused(text, reason):
    with pytest.raises(Unreadable, match=reason) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: 2024-99-99", {"a": "2024-99-99"}),
        ("a: 2024-02-03", {"a": "2024-02-03"}),
        ("2024-02-03: x", {"2024-02-03": "x"}),
        ("a: &a {x: 1}\nb: {<<: *a, y: 2}", {"a": {"x": 1}, "b": {"x": 1, "y": 2}}),
        ("[1, 1.5, yes, ~, 'a b']", [1, 1.5, True, None, "a b"]),
    ],
)
def test_other_yaml_is_read_and_dates_stay_text(text, value):
    assert parse_yaml(text) == value


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Unreadable, match="is no regular file"):
        read_text(tmp_path / "pipe")


def test_text_is_utf8_within_its_size(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(b"ab\xffcd")
    with pytest.raises(Unreadable, match="is not UTF-8 from byte 2 on"):
        read_text(file)
    file.write_text("größe")
    assert read_text(file, most=7) == "größe"
    with pytest.raises(Unreadable, match="is larger than 6 bytes"):
        read_text(file, most=6)


def test_what_an_error_says_is_one_line_of_bounded_length():
    error = SourceError("tensor a\nb\x1b[31m\ud800\u2028 is bad.", fix="mend\rit.")
    assert error.message == r"tensor a\nb\x1b[31m\ud800\u2028 is bad."
    assert error.fix == r"mend\rit."
    assert SourceError("größe 模型", fix="").message == "größe 模型"
    long = SourceError("a" * 10**6 + " is the rule.", fix="").message
    assert len(long) < LONGEST_LINE + 20
    assert long.endswith(" is the rule.")


def test_a_file_that_is_not_there_is_an_error_of_the_system():
    with pytest.raises(FileNotFoundError):
        read_text(Path("/nowhere/at/all"))
