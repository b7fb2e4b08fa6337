"""What freed memory does, asked of another process: it sets up its allocator for good."""

import subprocess
import sys

import pytest

PROGRAM = """
import re, torch
from pathlib import Path
from autoquant.model.memory import keep_freed_memory, return_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

keep_freed_memory()
tensors = [torch.ones(2**18) for _ in range(200)]
del tensors[::2]
before = resident()
return_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries are left alone")
def test_holes_between_what_is_kept_are_returned():
    """100 tensors of 1 MiB are freed, each between two that stay."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert 80 < int(done.stdout) < 120
