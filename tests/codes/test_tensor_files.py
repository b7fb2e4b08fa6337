"""Files of tensors: damage of any byte, and a file that is cut off while it is read."""

import os

import pytest
import torch

from autoquant.codes import tensor_files
from autoquant.codes.tensor_files import (
    TensorFile,
    digest_of,
    names_in,
    read_tensors,
    write_tensors,
)

ENTRIES = {
    "a": {"codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3), "scale": torch.tensor(0.5)},
    "b": {"codes": torch.ones(3, dtype=torch.bfloat16)},
}
FACTS = {"b": "no moments"}


def same(found: TensorFile | None) -> bool:
    return found is not None and all(
        torch.equal(found.entries[name][part], tensor)
        for name, own in ENTRIES.items()
        for part, tensor in own.items()
    )


def test_a_change_of_any_byte_is_damage(tmp_path):
    path = tmp_path / "codes.safetensors"
    content = TensorFile(ENTRIES, FACTS).content()
    write_tensors(path, content)
    assert same(read_tensors(path, ENTRIES))
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x01
        path.write_bytes(changed)
        found = read_tensors(path, ENTRIES)
        assert found is None or (same(found) and found.facts == FACTS), place
        path.write_bytes(content[:place])
        assert read_tensors(path, ENTRIES) is None
        assert digest_of(path, ()) is None
        assert names_in(path) == ()


def test_a_file_that_is_cut_off_while_it_is_read_is_damaged(tmp_path, monkeypatch):
    path = tmp_path / "codes.safetensors"
    write_tensors(path, TensorFile(ENTRIES, FACTS).content())
    plain = tensor_files.read_tensor

    def cut_first(header):
        os.truncate(path, header.begin)
        return plain(header)

    monkeypatch.setattr(tensor_files, "read_tensor", cut_first)
    assert read_tensors(path, ENTRIES) is None


@pytest.mark.parametrize("said", ["null", "[]", "7", "{}", '{"sha256": 7}', "x"])
def test_metadata_of_any_type_is_damage(tmp_path, said):
    from safetensors.torch import save

    path = tmp_path / "codes.safetensors"
    path.write_bytes(save(ENTRIES["a"], {"autoquant": said}))
    assert read_tensors(path, ENTRIES) is None
    assert digest_of(path, ()) is None


def test_a_digest_is_of_the_entries_that_are_asked_for(tmp_path):
    path, other = tmp_path / "both.safetensors", tmp_path / "one.safetensors"
    write_tensors(path, TensorFile(ENTRIES, FACTS).content())
    write_tensors(other, TensorFile({"b": ENTRIES["b"]}).content())
    assert names_in(path) == ("a", "b")
    assert digest_of(path, ["b"]) == digest_of(other, ["b"]) != digest_of(path, ["a", "b"])
    assert digest_of(other, ["a", "b"]) is None
