"""A short run of both harnesses, as `make robustness` makes a long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from events import can_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_run(), reason="needs Linux and a C compiler"),
]


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
