"""How the time of a search grows with the number of blocks, at equal width and equal tokens.

Each search runs in a process of its own. Its times are processor seconds (`cpu_seconds` of
`work.jsonl`), which other programs on the machine hardly change.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import autoquant
from autoquant.report.style import new_figure, project_style, to_png
from autoquant.store.run_directory import WORK, read_records
from experiments.common.record import provenance, write
from experiments.scale.make import make

BLOCKS = (8, 16, 32)
WIDTH = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_local_experts": 8,
    "vocab_size": 1024,
}
RESULTS = Path(__file__).parent / "results"


def search(model: Path, out: Path) -> None:
    """A search with screened probes; its times are in its run directory."""
    autoquant.search(
        model,
        budget_bpe=6.0,
        calibration="stdlib",
        calibration_tokens=512,
        search_tokens=512,
        report_tokens=512,
        sequence_length=64,
        batch_tokens=256,
        effort="fast",
        trials=4,
        mlflow=False,
        export=False,
        out=out,
    )


def measure(blocks: int, work: Path) -> dict[str, Any]:
    """Processor seconds of each stage of a search of so many blocks."""
    model, out = work / f"model-{blocks}", work / f"run-{blocks}"
    make(model, {**WIDTH, "num_hidden_layers": blocks}, torch.device("cpu"))
    words = ["-m", "experiments.scale.growth", "--model", str(model), "--work", str(out)]
    subprocess.run([sys.executable, *words], check=True)
    stages = {record["stage"]: record["cpu_seconds"] for record in read_records(out, WORK)}
    return {"blocks": blocks, "stages": stages, "cpu_seconds": sum(stages.values())}


def fit(points: list[dict[str, Any]]) -> dict[str, float]:
    """The straight line of least squares through seconds against blocks."""
    blocks = np.array([point["blocks"] for point in points], dtype=float)
    seconds = np.array([point["cpu_seconds"] for point in points])
    slope, start = np.polyfit(blocks, seconds, 1)
    exponent = np.polyfit(np.log(blocks), np.log(seconds), 1)[0]
    off = np.abs(start + slope * blocks - seconds) / seconds
    return {
        "seconds_per_block": float(slope),
        "seconds_at_none": float(start),
        "largest_relative_deviation": float(off.max()),
        "exponent": float(exponent),
    }


def draw(result: dict[str, Any]) -> bytes:
    """Seconds against blocks with the line, as PNG."""
    line, points = result["fit"], result["points"]
    blocks = [point["blocks"] for point in points]
    with project_style():
        figure = new_figure(5.0, 3.2)
        axes = figure.add_subplot()
        ends = np.array([0, max(blocks)])
        axes.plot(ends, line["seconds_at_none"] + line["seconds_per_block"] * ends, label="line")
        axes.plot(blocks, [p["cpu_seconds"] for p in points], "o", label="all of a search")
        axes.plot(blocks, [p["stages"]["probe"] for p in points], "s", label="of it probes")
        axes.set_xlabel("blocks")
        axes.set_ylabel("processor seconds")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend()
        return to_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="search this model alone")
    parser.add_argument("--work", type=Path, help="run directory of that search")
    parser.add_argument("--commit", help="of the code, where git does not say it")
    arguments = parser.parse_args()
    if arguments.model is not None:
        search(arguments.model, arguments.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        points = [measure(blocks, Path(folder)) for blocks in BLOCKS]
    result = {**provenance(arguments.commit), "width": WIDTH, "points": points, "fit": fit(points)}
    write(RESULTS / "growth.json", result)
    (RESULTS / "growth.png").write_bytes(draw(result))
    print(result["fit"])


if __name__ == "__main__":
    main()
