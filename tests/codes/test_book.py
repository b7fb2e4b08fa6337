"""The code book: one encode a group and choice, bounded memory, true codes on disk."""

import dataclasses
import json
from collections import Counter
from fractions import Fraction

import pytest
import torch
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.codes.book import CodeBook
from autoquant.codes.cache import CodeCache
from autoquant.codes.weights import FileWeights
from autoquant.formats import FP8, NVFP4, Choice, all_formats, registered
from autoquant.formats.nvfp4 import Nvfp4
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

MSE = Choice.parse("nvfp4/mse")


class Counting:
    """Counts what formats encode, by the weight and the choice."""

    def __init__(self, monkeypatch):
        self.calls = Counter()
        for format in all_formats():
            monkeypatch.setattr(type(format), "encode", self._counted(type(format).encode))

    def _counted(self, encode):
        def counted(format, weight, choice, statistics):
            content = hash(weight.view(torch.uint8).numpy().tobytes())
            self.calls[content, tuple(weight.shape), choice] += 1
            return encode(format, weight, choice, statistics)

        return counted


@pytest.fixture
def source(tmp_path):
    return open_source(save_searchable("qwen3_moe", tmp_path / "model"))


def as_bytes(packed):
    return {n: part.reshape(-1).view(torch.uint8).tolist() for n, part in packed.parts.items()}


def same(one, other):
    return as_bytes(one) == as_bytes(other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_search_and_export_encode_each_choice_of_a_group_once(
    autoquant, tmp_path, monkeypatch, kind
):
    model = save_searchable(kind, tmp_path / "model")
    text = save_text(tmp_path / "text")
    counting = Counting(monkeypatch)
    flags = ("--calibration", text, *TOKEN_FLAGS, "--trials", 6, "--no-mlflow")
    run = tmp_path / "run"
    done = autoquant("search", model, "--budget-bpe", 10, "--out", run, *flags)
    assert done.exit_code == 0, done.stderr
    assert (run / "checkpoint").is_dir()
    groups = json.loads((run / "groups.json").read_text())["groups"]
    assert {choice for *_, choice in counting.calls} >= {NVFP4, MSE, FP8}
    assert set(counting.calls.values()) == {1}
    assert len(counting.calls) >= sum(len(group["choices"]) - 1 for group in groups)


def test_memory_stays_within_its_bound_and_codes_are_the_same(source, monkeypatch):
    groups = find_groups(source).groups
    counting = Counting(monkeypatch)
    roomy = CodeBook(FileWeights(source.headers), memory_bytes=2**30)
    tight = CodeBook(FileWeights(source.headers), memory_bytes=0)
    for _ in range(2):
        for group in groups[:2]:
            for linear in group.linears:
                one = roomy.linear(group, linear, MSE)
                assert same(one, tight.linear(group, linear, MSE))
    linears = sum(len(group.linears) for group in groups[:2])
    assert counting.calls.total() == linears + 2 * linears
    assert len(tight._packed._recent) == 1
    assert not tight._packed._stay


def test_given_codes_take_the_place_of_encoded_ones(source):
    group = find_groups(source).groups[0]
    book = CodeBook(FileWeights(source.headers), memory_bytes=0)
    codes = {linear.name: book.linear(group, linear, MSE) for linear in group.linears}
    book.give(group, NVFP4, codes)
    for linear in group.linears:
        assert same(book.linear(group, linear, NVFP4), codes[linear.name])


class Costly(Nvfp4):
    """NVFP4 whose codes are worth a file."""

    name = "costly"
    weight_bits = Fraction(9, 2)

    def is_costly(self, choice):
        return True


@pytest.fixture
def costly():
    with registered(Costly()) as format:
        yield Choice(format, "max")


def cached(source, tmp_path, *, made_from="source", most_bytes=2**20):
    cache = CodeCache(tmp_path / "codes", made_from=made_from, most_bytes=most_bytes)
    return CodeBook(FileWeights(source.headers), memory_bytes=0, cache=cache)


def encode(book, group, choice):
    for unit in book.units(group):
        book.unit(group, unit, choice)


def test_costly_codes_are_read_again_and_not_made(source, tmp_path, costly, monkeypatch):
    group = find_groups(source).groups[0]
    first = [cached(source, tmp_path).linear(group, own, costly) for own in group.linears]
    counting = Counting(monkeypatch)
    again = [cached(source, tmp_path).linear(group, own, costly) for own in group.linears]
    assert not counting.calls
    assert all(map(same, first, again))
    assert all(torch.equal(a.decode(), b.decode()) for a, b in zip(first, again, strict=True))
    other = cached(source, tmp_path, made_from="another source")
    other.linear(group, group.linears[0], costly)
    assert counting.calls.total() == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_damaged_codes_are_made_again(source, tmp_path, costly, damage):
    group = find_groups(source).groups[0]
    linear = group.linears[0]
    expected = cached(source, tmp_path).linear(group, linear, costly)
    (file,) = (tmp_path / "codes").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    changed = {"flip": content, "cut": content[:-3], "empty": b""}
    file.write_bytes(changed[damage]) if damage in changed else file.unlink()
    book = cached(source, tmp_path)
    assert same(book.linear(group, linear, costly), expected)
    kept = book.cache.read(group.name, costly, "", [linear.name])
    assert same(kept.packed[linear.name], expected)


def test_the_folder_keeps_its_bound_and_loses_what_was_used_longest_ago(source, tmp_path, costly):
    groups = [group for group in find_groups(source) if group.role == "o"]
    first, second = groups
    encode(cached(source, tmp_path), first, costly)
    (file,) = (tmp_path / "codes").iterdir()
    size = file.stat().st_size
    book = cached(source, tmp_path, most_bytes=size + size // 2)
    encode(book, second, costly)
    (file,) = (tmp_path / "codes").iterdir()
    assert file.stat().st_size <= size + size // 2
    assert not cached(source, tmp_path).has(first, costly)
    assert cached(source, tmp_path).has(second, costly)
    encode(cached(source, tmp_path, most_bytes=size // 2), first, costly)
    assert cached(source, tmp_path).has(second, costly)


def test_plain_rounding_is_not_kept_on_disk(source, tmp_path):
    group = find_groups(source).groups[0]
    cached(source, tmp_path).linear(group, group.linears[0], dataclasses.replace(MSE))
    assert not (tmp_path / "codes").exists()


SPACE = """
schema_version: 1
name: with-costly
scale_rules: [max]
rules: [{match: [qkv, o, experts], formats: [costly, bf16]}]
"""


@pytest.mark.slow
def test_a_resumed_search_reads_costly_codes_from_its_run_directory(
    autoquant, tmp_path, monkeypatch, costly
):
    model = save_searchable("qwen3_moe", tmp_path / "model")
    space, run = tmp_path / "with-costly.yaml", tmp_path / "run"
    space.write_text(SPACE)
    flags = ("--calibration", save_text(tmp_path / "text"), *TOKEN_FLAGS, "--trials", 2)
    call = ("search", model, "--space", space, "--budget-bpe", 12, "--out", run)
    first = autoquant(*call, *flags, "--no-mlflow", "--no-export", "--format", "json")
    assert first.exit_code == 0, first.stderr
    assert list((run / "codes").iterdir())
    for name in ("result.json", "study.log", "sensitivity.json", "sensitivity.jsonl"):
        (run / name).unlink()
    counting = Counting(monkeypatch)
    again = autoquant(*call, *flags, "--no-mlflow", "--no-export", "--format", "json")
    assert again.exit_code == 0, again.stderr
    assert not counting.calls
    assert json.loads(again.stdout)["kl"] == json.loads(first.stdout)["kl"]
