"""A short run of both harnesses, as `make robustness` makes a long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from events import can_run
from kills import shares


@pytest.mark.slow
@pytest.mark.skipif(not can_run(), reason="needs Linux and a C compiler")
@pytest.mark.parametrize(
    "call",
    [
        ("kills.py", "--kills", "6", "--only", "export"),
        ("fuzz.py", "--mutations", "40"),
    ],
    ids=" ".join,
)
def test_nothing_is_wrong(call, tmp_path):
    script = Path(__file__).with_name(call[0])
    command = [sys.executable, str(script), *call[1:], "--state", str(tmp_path / "state.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    figures = json.loads((tmp_path / "state.json").read_text())
    assert figures["failures"] == []
    assert done.returncode == 0, done.stderr
    assert sum((figures.get("mutations") or figures["cases"]).values()) >= 6


def test_commands_have_equal_shares_and_what_one_has_no_place_for_goes_to_the_others():
    assert shares(1000, [600, 12, 700, 9]) == [489, 12, 490, 9]
    assert shares(8, [100, 100]) == [4, 4]
    assert shares(100, [3, 2]) == [3, 2]
