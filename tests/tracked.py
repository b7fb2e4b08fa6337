"""The files of the repository, as git knows them."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tracked_files() -> list[Path]:
    """Every file that a checkout has, and new ones that git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("git: this is no checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
