"""Results as JSON files that say what made them."""

import argparse
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from autoquant.files import to_json, write_atomic

PACKAGES = ("torch", "transformers", "optuna", "scipy", "nvidia-modelopt")


def provenance(commit: str | None) -> dict[str, Any]:
    """Commit, machine and versions."""
    return {
        "commit": commit or _git_commit(),
        "machine": {"processor": _processor(), "threads": torch.get_num_threads(), "gpu": _gpu()},
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a command line but for `out`, without the folders of this machine."""
    return {name: said(value) for name, value in vars(arguments).items() if name != "out"}


def said(value: Any) -> Any:
    """A value of a setting; of a file or a folder its name alone."""
    is_place = isinstance(value, Path) or (isinstance(value, str) and Path(value).exists())
    return Path(value).name if is_place else value


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def show(figures: dict[str, Any], out: Path | None) -> None:
    """Print figures, and keep them where a file is named."""
    text = to_json(figures, indent=2)
    if out is not None:
        write_atomic(out, text)
    print(text)


def _git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
