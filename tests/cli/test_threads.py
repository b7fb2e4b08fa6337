"""How CPU threads wait, as OpenMP itself reports it when a command loads PyTorch."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("users", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(users, expected):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": users} if users else {})
    done = subprocess.run(
        [sys.executable, "-m", "autoquant", "env"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr
