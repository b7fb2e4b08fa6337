"""Where calibration text comes from, and what is said when it cannot be read."""

import json
from dataclasses import replace

import pytest

from autoquant.data import hub
from autoquant.data.chat import Conversation
from autoquant.data.text import load_corpus
from autoquant.errors import SourceError


def refused(name: object) -> SourceError:
    with pytest.raises(SourceError) as caught:
        load_corpus(str(name))
    assert caught.value.fix
    return caught.value


def test_the_standard_library_is_there_and_the_same_each_time():
    corpus = load_corpus()
    assert corpus.name == "stdlib"
    assert len(corpus.documents) > 20
    assert corpus == load_corpus("stdlib")


def test_a_text_file_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n", encoding="utf-8")
    assert load_corpus(str(file)).documents == ("one\ntwo\n",)


def test_a_byte_order_mark_is_no_text(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n', encoding="utf-8-sig")
    assert load_corpus(str(file)).documents == ("one",)


def test_records_give_their_text(tmp_path):
    file = tmp_path / "a.jsonl"
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "again"}, {"type": "image"}]},
    ]
    records = [
        {"text": "plain", "source": "x"},
        "a string",
        {"messages": turns},
        {"messages": ["no", {"content": "roles"}]},
        {"question": "why", "answer": "because", "score": 1},
        {"title": "a", "body": "b", "score": 1},
    ]
    file.write_text("\n".join(map(json.dumps, records)) + "\n\n", encoding="utf-8")
    assert load_corpus(str(file)).documents == (
        "plain",
        "a string",
        Conversation((("user", "hello"), ("user", "again"))),
        "no\nroles",
        Conversation((("user", "why"), ("assistant", "because"))),
        "a\nb",
    )


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x1c"])
def test_line_separators_inside_a_record_do_not_end_it(tmp_path, separator):
    file = tmp_path / "a.jsonl"
    text = f"one{separator}two"
    file.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_corpus(str(file)).documents == (text,)


RECORDS = [{"instruction": f"Count to {n}.", "output": "one two three"} for n in range(1, 4)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_holds_a_record_each(tmp_path, name, indent):
    file = tmp_path / name
    file.write_text(json.dumps(RECORDS, indent=indent))
    found = load_corpus(str(file)).documents
    assert [document.turns[0][1] for document in found] == [f"Count to {n}." for n in range(1, 4)]


def test_an_indented_object_is_one_record(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "one", "score": 1}, indent=2))
    assert load_corpus(str(tmp_path)).documents == ("one",)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("around", "key", "array"),
    [
        ({"version": "1.0"}, "data", [{"prompt": "one"}, {"prompt": "two"}]),
        ({}, "text", ["one", "two"]),
    ],
)
def test_an_object_may_hold_the_array(tmp_path, indent, around, key, array):
    """As SQuAD's files do, and the columns of a data set."""
    file = tmp_path / "records.json"
    file.write_text(json.dumps(around | {key: array}, indent=indent))
    assert list(load_corpus(str(file)).documents) == ["one", "two"]


def test_a_record_with_an_array_beside_its_text_is_one_record(tmp_path):
    file = tmp_path / "records.json"
    file.write_text(json.dumps({"text": "one", "sources": [{"url": "two"}]}))
    assert list(load_corpus(str(file)).documents) == ["one"]


def test_a_record_of_an_array_without_text_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "fine"}, {"score": 1}]))
    assert f"{tmp_path / 'a.json'} record 2 has no text field" in refused(tmp_path).message


def test_an_empty_array_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    assert "holds no text" in refused(tmp_path / "a.json").message


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A mixture of two local data sets, loaded as those of the hub are."""
    chat, prose = tmp_path / "chat", tmp_path / "prose"
    for folder, records in ((chat, RECORDS), (prose, [{"id": "x", "article": "A storm."}])):
        folder.mkdir()
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = (
        hub.Part(name=str(chat), split="train"),
        hub.Part(name=str(prose), split="train", column="article"),
    )
    monkeypatch.setattr(hub, "PARTS", found)
    return found


def test_the_mixture_takes_the_first_documents_of_every_part(parts, monkeypatch):
    monkeypatch.setattr(hub, "PART_DOCUMENTS", 2)
    *chat, prose = load_corpus(hub.MIXTURE).documents
    assert [document.turns[0][1] for document in chat] == ["Count to 1.", "Count to 2."]
    assert prose == "A storm."


def test_a_part_that_cannot_be_loaded_is_named_with_two_ways_out(parts, monkeypatch):
    gone = hub.Part(name="nobody/such-a-data-set", split="train")
    monkeypatch.setattr(hub, "PARTS", (*parts, gone))
    error = refused(hub.MIXTURE)
    assert "loading nobody/such-a-data-set failed: " in error.message
    assert "--calibration stdlib" in error.fix
    assert "--calibration FILE" in error.fix


def test_a_part_whose_column_is_gone_is_named(parts, monkeypatch):
    changed = replace(parts[1], column="body")
    monkeypatch.setattr(hub, "PARTS", (changed,))
    assert f"{changed.name} row 0 has no text field" in refused(hub.MIXTURE).message


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "sub.txt").mkdir()
    (tmp_path / "sub.txt" / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "z.jsonl").write_text('{"text": "third"}')
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    assert load_corpus(str(tmp_path)).documents == ("first", "second", "third")


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    error = refused(tmp_path)
    assert "holds no text" in error.message
    assert ".jsonl" in error.fix


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert "holds no text" in refused(tmp_path / "a.txt").message


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused(name):
    assert "empty" in refused(name).message


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("größe".encode("latin-1"))
    error = refused(tmp_path)
    assert str(tmp_path / "a.txt") in error.message
    assert "UTF-8" in error.message


def test_a_broken_record_is_named_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    message = refused(tmp_path).message
    assert f"{tmp_path / 'a.jsonl'}:2 is not JSON: Expecting value at column 10" in message


@pytest.mark.parametrize("record", ['{"score": 1}', "[1, 2]", "7"])
def test_a_record_without_text_is_named(tmp_path, record):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{record}\n')
    assert f"{tmp_path / 'a.jsonl'}:2 has no text field" in refused(tmp_path).message


@pytest.mark.parametrize("name", ["nobody/such-a-data-set:train", "no-such-folder/text.txt"])
def test_a_data_set_that_cannot_be_reached_is_named(name):
    error = refused(name)
    assert repr(name) in error.message
    assert "org/name:split" in error.fix
