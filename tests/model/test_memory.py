"""What freed memory does, asked of another process: it sets up its allocator for good."""

import subprocess
import sys

import pytest
from searchable import save_searchable

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


STREAMED = """
import re, sys, torch
from pathlib import Path
from autoquant.codes.held import Weights
from autoquant.model.loading import load_model
from autoquant.model.streaming.placement import Allowance

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

allowance = Allowance(weights=Weights.DISK)
loaded = load_model(Path(sys.argv[1]), torch.device("cpu"), allowance=allowance)
torch.ones(2**21)  # from here on glibc by itself would keep others of its size
tensors = [torch.ones(2**21) for _ in range(20)]
before = resident()
del tensors[:-1]
print(before - resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries are left alone")
def test_parts_of_blocks_that_come_and_go_leave_no_holes(tmp_path):
    """19 tensors of 8 MiB are freed below one that stays, where blocks are streamed."""
    folder = save_searchable("llama", tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-c", STREAMED, str(folder)], capture_output=True, text=True, check=True
    )
    assert 120 < int(done.stdout) < 180


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries are left alone")
def test_holes_between_what_is_kept_are_returned():
    """100 tensors of 1 MiB are freed, each between two that stay."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert 80 < int(done.stdout) < 120
