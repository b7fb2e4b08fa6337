"""What one timing is called and where it was taken; rows are appended to a CSV file."""

import csv
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

PACKAGES = ("torch", "triton", "nvidia-modelopt", "compressed-tensors", "torchao")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One operation of one implementation on one shape; times in microseconds."""

    op: str
    backend: str
    shape: str
    dtype: str
    threads: int
    p20_us: float
    p50_us: float
    p80_us: float
    bytes: int
    gigabytes_per_s: float
    ratio_to_copy: float
    machine: str
    versions: str
    commit: str


def row(
    op: str,
    backend: str,
    shape: Sequence[int],
    microseconds: Sequence[float],
    *,
    bytes: int,
    copy_us: float,
    dtype: str = "bfloat16",
) -> Row:
    """The row of many timings; `bytes` is the least an implementation must read and write."""
    p20, p50, p80 = (percentile(microseconds, q) for q in (0.2, 0.5, 0.8))
    return Row(
        op=op,
        backend=backend,
        shape="x".join(map(str, shape)),
        dtype=dtype,
        threads=torch.get_num_threads(),
        p20_us=round(p20, 2),
        p50_us=round(p50, 2),
        p80_us=round(p80, 2),
        bytes=bytes,
        gigabytes_per_s=round(bytes / p50 / 1e3, 1),
        ratio_to_copy=round(p50 / copy_us, 3),
        machine=machine(),
        versions=versions(),
        commit=commit(),
    )


def percentile(values: Sequence[float], q: float) -> float:
    """The value below which the share `q` of `values` lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def median(values: Sequence[float]) -> float:
    """The middle of `values`."""
    return statistics.median(values)


def write(rows: Sequence[Row], path: Path) -> None:
    """Write all rows to `path` as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(r) for r in rows)


def machine() -> str:
    """The accelerator, or the processor and how many cores of it there are."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> str:
    """Installed versions of everything that was timed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return " ".join(f"{name}={number}" for name, number in found.items())


def commit() -> str:
    """The commit that was timed, as `AUTOQUANT_COMMIT` or git says."""
    if given := os.environ.get("AUTOQUANT_COMMIT"):
        return given
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def assert_equal(expected: Tensor, got: Tensor) -> None:
    """Raise unless both hold the same bits."""
    width = torch.int16 if expected.element_size() == 2 else torch.int32
    wrong = (expected.view(width) != got.cpu().view(width)).sum().item()
    assert wrong == 0, f"{wrong} of {expected.numel()} elements differ"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
