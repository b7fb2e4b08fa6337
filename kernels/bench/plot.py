"""Draws achieved bandwidth beside the copy of the same run.

python kernels/bench/plot.py kernels/bench/results/*.csv --out kernels/bench/results/roofline.png
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

OURS, PEERS, COPY = "#1f6fb4", "#b8b8b8", "#d9822b"
HEAD = "head"


def main() -> None:
    """Parse the command line and draw one panel per file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    figure, axes = plt.subplots(
        1, len(arguments.files), figsize=(6.5 * len(arguments.files), 5.5), squeeze=False
    )
    for panel, path in zip(axes[0], arguments.files, strict=True):
        draw(panel, largest_shape(read(path)))
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=120)


def read(path: Path) -> list[dict[str, str]]:
    """The element-wise rows of a results file."""
    with path.open() as file:
        return [row for row in csv.DictReader(file) if not row["op"].startswith(HEAD)]


def largest_shape(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of the shape with the most bytes."""
    shape = max(rows, key=lambda row: int(row["bytes"]))["shape"]
    return [row for row in rows if row["shape"] == shape]


def draw(panel: Axes, rows: list[dict[str, str]]) -> None:
    """Bars of bandwidth, fastest first, with the copy as the line that memory allows."""
    ordered = sorted(rows, key=speed)
    names = [label(row) for row in ordered]
    speeds = [speed(row) for row in ordered]
    copy = next(speed(row) for row in rows if row["op"] == "copy")
    bars = panel.barh(names, speeds, color=[colour(row) for row in ordered])
    panel.axvline(copy, color=COPY, linewidth=1)
    texts = panel.bar_label(
        bars, [f"{s / copy:.2g} of copy" for s in speeds], padding=4, fontsize=8
    )
    for text in texts:
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    panel.set_xlim(0, 1.25 * max(speeds))
    panel.set_xlabel("GB/s read and written (the least the operation needs)")
    panel.set_title(f"{rows[0]['machine']}\nbfloat16 {rows[0]['shape']}", fontsize=9)
    panel.tick_params(axis="y", labelsize=8)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def speed(row: dict[str, str]) -> float:
    """GB/s of the median."""
    return int(row["bytes"]) / float(row["p50_us"]) / 1e3


def label(row: dict[str, str]) -> str:
    """The operation, and the implementation if it is not ours."""
    ours = row["backend"].startswith(("cpu-", "triton"))
    op = row["op"].split(" modelopt")[0]
    return op if ours else f"{op}, {row['backend']}"


def colour(row: dict[str, str]) -> str:
    """Ours, a peer, or the copy."""
    if row["op"] == "copy":
        return COPY
    return OURS if row["backend"].startswith(("cpu-", "triton")) else PEERS


if __name__ == "__main__":
    main()
