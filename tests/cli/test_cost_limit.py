"""A second limit from a file: what products cost, and the most that they may cost together."""

import json

import pytest

TABLE = """
schema_version: 1
unit: microseconds a token
scale: 10
rows:
  - {role: "*", shape: "*", choice: nvfp4, cost: 1.5}
  - {role: "*", shape: "*", choice: fp8, cost: 3}
  - {role: "*", shape: "*", choice: bf16, cost: 9}
"""

FLOOR = 8 * 1.5 + 9
"""Every product in NVFP4, and the head."""


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "costs.yaml"
    file.write_text(TABLE)
    return file


def read(page):
    return page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_both_limits_hold_and_the_second_one_bites(search, table):
    _, free = search("--cost-table", table, "--cost-limit", 1e6, "--no-export", out="free")
    unlimited = json.loads((free / "result.json").read_text())["limits"][1]["taken"]
    limit = (unlimited + FLOOR) / 2
    done, run = search("--cost-table", table, "--cost-limit", limit, out="limited")
    result = json.loads((run / "result.json").read_text())
    first, second = result["limits"]
    assert second["unit"] == "microseconds a token"
    assert second["asked"] == limit
    assert 0 < second["taken"] <= limit
    assert first["total"] <= first["at_most"]
    assert unlimited > limit  # the search without the second limit took more
    told = f"{limit:g} microseconds a token at most, of which it takes {second['taken']:.4g}"
    for page in (done.stdout, *map(read, (run / "report.html", run / "checkpoint" / "README.md"))):
        assert told in page


@pytest.mark.parametrize("flag", ["--cost-table", "--cost-limit"])
def test_a_table_needs_a_limit_and_a_limit_a_table(search, table, flag, tmp_path):
    value = table if flag == "--cost-table" else 5
    done, _ = search(flag, value, code=2)
    assert "is missing: a table says what products cost, a limit the most of it." in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_choice_without_a_row_is_named(search, table, tmp_path):
    rows = TABLE.splitlines(keepends=True)
    table.write_text("".join(row for row in rows if "fp8" not in row))
    done, _ = search("--cost-table", table, "--cost-limit", 50, code=2)
    assert "has no row for model.layers.0.self_attn.qkv in fp8" in done.stderr
    assert not (tmp_path / "run").exists()
