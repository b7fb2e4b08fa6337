"""Our reader of safetensors headers against the library's own, over mutated files.

What is accepted is the same, and is read the same, with three exceptions that are ours: a name that
is there twice, of which readers may take either; an entry that is written as a list, which only
serde takes; and dtypes that PyTorch lacks.
"""

import json
import re

import pytest
import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mutations import mutated_safetensors

from autoquant.errors import SourceError
from autoquant.source.headers import read_file_header

STRICTER = re.compile(
    r" names .* twice in its header\."
    r"| describes .* by other than dtype, shape and data_offsets\."
    r"| has dtype ('F4'|'F6_E2M3'|'F6_E3M2'|'F8_E4M3FNUZ'|'F8_E5M2FNUZ'|\{'.*': None\}), which",
    re.DOTALL,
)
"""Our reasons to refuse what the library takes."""


def whole(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of that header, given as JSON or as text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


SOUND = whole(
    {
        "__metadata__": {"format": "pt", "é": "\n"},
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b.weight": {"dtype": "U8", "shape": [], "data_offsets": [12, 13]},
        "c": {"dtype": "F32", "shape": [0, 5], "data_offsets": [13, 13]},
        "d": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [13, 16]},
    },
    bytes(16),
)


def theirs(content: bytes) -> dict | None:
    """What the library reads: dtype and shape by name; None where it refuses."""
    try:
        return {
            name: (info["dtype"], list(info["shape"]), bytes(info["data"]))
            for name, info in safetensors.deserialize(content)
        }
    except safetensors.SafetensorError:
        return None


def ours(path) -> dict | str:
    """What we read, with the bytes at the places that we found, or why we refuse."""
    content = path.read_bytes()
    try:
        entries, _ = read_file_header(path)
    except SourceError as error:
        return error.message
    return {e.name: (e.dtype, list(e.shape), content[e.begin : e.end]) for e in entries}


def check(content: bytes, path) -> None:
    path.write_bytes(content)
    found, expected = ours(path), theirs(content)
    if not isinstance(found, str):
        assert found == expected
    elif expected is not None:
        assert STRICTER.search(found)


@given(mutated_safetensors(SOUND))
@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(SOUND)
def test_the_same_files_are_accepted_with_the_same_content(tmp_path, content):
    check(content, tmp_path / "mutated.safetensors")


TENSOR = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' + TENSOR + b"}   ",
        b'  {"a":' + TENSOR + b"}",
        b'{"a":' + TENSOR + b"}\x00",
        b'{"a":' + TENSOR + b"}{}",
        b'\xef\xbb\xbf{"a":' + TENSOR + b"}",
        b'{"":' + TENSOR + b"}",
        b'{"a":' + TENSOR + b',"a":' + TENSOR + b"}",
        b'{"__metadata__":null,"a":' + TENSOR + b"}",
        b'{"__metadata__":{},"a":' + TENSOR + b"}",
        b'{"__metadata__":[],"a":' + TENSOR + b"}",
        b'{"__metadata__":{"a":1},"a":' + TENSOR + b"}",
        b'{"__metadata__":{"a":"b","a":"c"},"a":' + TENSOR + b"}",
        b'{"__metadata__":{"a":"\\ud800"},"a":' + TENSOR + b"}",
        b'{"__metadata__":{},"__metadata__":{},"a":' + TENSOR + b"}",
        b'{"\\ud800":' + TENSOR + b"}",
        b'{"\\ud83d\\ude00":' + TENSOR + b"}",
        b'{"a\t":' + TENSOR + b"}",
        b'{"a\\u0000":' + TENSOR + b"}",
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":1}}',
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[01],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[0,18446744073709551615,2],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[18446744073709551616,0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F64","shape":[4611686018427387904,0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":null,"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":{"0":0,"1":1}}}',
        b'{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"u8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":["U8",[1],[0,1]]}',
        b'{"a":null}',
        b"{}",
        b"",
        b"[]",
        b"null",
    ],
    ids=repr,
)
def test_what_parsers_of_json_disagree_about(tmp_path, header):
    for data in (b"", b"\x07", b"\x07\x07"):
        check(whole(header, data), tmp_path / "one.safetensors")


@pytest.mark.parametrize("end", ["", ',"more":1', ',"more":{"a":[]}'])
def test_an_entry_may_say_more_than_its_reader_knows(tmp_path, end):
    path = tmp_path / "more.safetensors"
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]' + end + "}"
    path.write_bytes(whole(f'{{"a":{entry}}}'.encode(), b"\x07"))
    assert ours(path) == theirs(path.read_bytes()) == {"a": ("U8", [1], b"\x07")}


@pytest.mark.parametrize("depth", [1, 100, 126, 127, 128, 129, 5000])
def test_nesting(tmp_path, depth):
    deep = b"[" * depth + b"]" * depth
    for header in (b'{"__metadata__":' + deep + b"}", b'{"a":' + deep + b"}", deep):
        check(whole(header), tmp_path / "deep.safetensors")


@given(st.binary(max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(tmp_path, content):
    check(content, tmp_path / "bytes.safetensors")
