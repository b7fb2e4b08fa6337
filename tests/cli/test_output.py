"""Results on standard output, words for the user on standard error."""

import json

from autoquant.cli.output import note, print_fields, print_json, print_table, warn


def test_json_has_a_schema_version_and_no_nan(capsys):
    print_json({"kl": float("nan"), "rows": ({"bpe": float("inf")}, 1.5), "name": "größe"})
    assert json.loads(capsys.readouterr().out) == {
        "schema_version": 1,
        "kl": None,
        "rows": [{"bpe": None}, 1.5],
        "name": "größe",
    }


def test_tables_align_and_set_numbers_flush_right(capsys):
    print_table(["group", "bpe"], [("a.qkv", "4.50"), ("b", "16.00")])
    assert capsys.readouterr().out == "group    bpe\na.qkv   4.50\nb      16.00\n"


def test_a_table_without_rows_is_its_header(capsys):
    print_table(["group", "bpe"], [])
    assert capsys.readouterr().out == "group  bpe\n"


def test_fields_align(capsys):
    print_fields({"kl": 0.5, "budget": 5})
    assert capsys.readouterr().out == "kl      0.5\nbudget  5\n"


def test_notes_and_warnings_leave_standard_output_alone(capsys):
    note("reading")
    warn("slow disk")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "reading\nwarning: slow disk\n"
