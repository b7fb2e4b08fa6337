"""Headers of safetensors files, sound and damaged."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from autoquant.errors import SourceError
from autoquant.source.headers import Headers, read_file_header
from autoquant.source.tensors import TORCH_DTYPES, read_tensor

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

DTYPES = sorted(TORCH_DTYPES.keys() - {"C64", "F8_E8M0", "U16", "U32", "U64"})


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict:
    return {"dtype": dtype, "shape": shape or [end - begin], "data_offsets": [begin, end]}


tensors = st.dictionaries(
    st.text(
        st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12
    ).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)


@given(tensors)
@SHARED_FOLDER
def test_what_safetensors_writes_is_read_back(tmp_path, described):
    made = {
        name: torch.randint(0, 2, shape).to(TORCH_DTYPES[dtype])
        for name, (dtype, shape) in described.items()
    }
    path = tmp_path / "model.safetensors"
    save_file(made, path, metadata={"format": "pt"})
    entries, metadata = read_file_header(path)
    assert metadata == {"format": "pt"}
    assert {e.name: (e.dtype, list(e.shape)) for e in entries} == described
    for entry in entries:
        assert entry.elements == math.prod(entry.shape)
        assert entry.bytes == entry.elements * made[entry.name].element_size()
        assert torch.equal(
            read_tensor(entry).reshape(-1).view(torch.uint8),
            made[entry.name].reshape(-1).view(torch.uint8),
        )


@given(st.data())
@SHARED_FOLDER
def test_every_truncation_is_an_error_that_names_the_file(tmp_path, data):
    path = tmp_path / "cut.safetensors"
    save_file({"a": torch.arange(6), "b": torch.ones(3, 2, dtype=torch.bfloat16)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(SourceError, match=r"cut\.safetensors"):
        read_file_header(path)


@given(st.data())
@SHARED_FOLDER
def test_a_flipped_header_byte_never_crashes_nor_reads_outside_of_the_file(tmp_path, data):
    path = tmp_path / "flipped.safetensors"
    save_file({"a": torch.arange(6), "b": torch.ones(3, 2, dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        entries, _ = read_file_header(path)
    except SourceError:
        return
    assert all(0 <= entry.begin <= entry.end <= len(content) for entry in entries)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": tensor(0, 4), "b": tensor(2, 6)}, b"123456", "overlap at b"),
        ({"a": tensor(0, 4), "b": tensor(6, 8)}, b"12345678", "2 unused bytes at b"),
        ({"a": tensor(0, 400)}, b"1234", "is truncated: its tensors end"),
        ({"a": tensor(0, 2)}, b"1234", "2 bytes behind its last tensor"),
        ({"a": tensor(0, 3, "BF16", [2])}, b"123", r"3 bytes; BF16 \[2\] takes 4"),
        ({"a": tensor(0, 4, shape=[-4])}, b"1234", r"shape \[-4\]"),
        ({"a": tensor(0, 4, shape=[True])}, b"1234", r"shape \[True\]"),
        ({"a": tensor(4, 0, shape=[4])}, b"1234", "-4 bytes; U8"),
        (
            {"a": {"dtype": "U8", "shape": [4]}},
            b"1234",
            "by other than dtype, shape and data_offsets",
        ),
        ({"a": tensor(0, 4, "F3")}, b"1234", "dtype 'F3', which is not one of"),
        ([1], b"", "not a JSON object"),
        (b"{", b"", "not JSON"),
        (b"\xff", b"", "not UTF-8 from byte 0"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        (b'{"a": {}, "a": {}}', b"", "names a twice"),
    ],
)
def test_damage_is_named(tmp_path, header, data, message):
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(SourceError, match=message) as caught:
        read_file_header(path)
    assert "bad.safetensors" in caught.value.message
    assert caught.value.fix


def test_a_header_of_absurd_size_is_not_read(tmp_path):
    path = write(tmp_path / "absurd.safetensors", {}, length=2**62)
    with pytest.raises(SourceError, match="4,611,686,018,427,387,904 bytes; at most 100,000,000"):
        read_file_header(path)


def test_one_tensor_in_two_files_is_an_error(tmp_path):
    for name in ("one", "two"):
        save_file({"same": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    files = (tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    with pytest.raises(SourceError, match=r"same is in one\.safetensors and in two\.safetensors"):
        Headers.read(files)


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error(tmp_path):
    path = tmp_path / "shrinking.safetensors"
    save_file({"a": torch.ones(8)}, path)
    entries, _ = read_file_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SourceError, match="changed while it was read"):
        read_tensor(entries[0])
