"""One table and one picture of all parts, subjects and seeds.

python -m experiments.ablation.summary experiments/ablation/results
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from experiments.vs_modelopt.summary import geometric

Cell = tuple[str, float]
Ratios = dict[str, dict[Cell, list[float]]]

BASE = "solver: exact"
"""Every KL is shown over that of this part with the same seed."""


def main() -> None:
    folder = Path(sys.argv[1])
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    search, fresh = (ratios(results, measure) for measure in ("search_kl", "fresh_kl"))
    print(table(search, fresh))
    draw(fresh, folder / "fresh.png")


def ratios(results: list[dict[str, Any]], measure: str) -> Ratios:
    """KL of each part over that of `BASE`, one for each seed of a subject and budget."""
    found: Ratios = defaultdict(lambda: defaultdict(list))
    for result in results:
        by_budget: dict[float, dict[str, float]] = defaultdict(dict)
        for row in result["rows"]:
            by_budget[row["budget_bpe"]][label(row)] = row[measure]
        for bpe, kl in by_budget.items():
            for name, value in kl.items():
                found[name][result["subject"], bpe].append(value / kl[BASE])
    return found


def label(row: dict[str, Any]) -> str:
    """The part, with the forwards that its candidates were measured with."""
    part: str = row["part"]
    return f"{part}, {row['forwards']}" if "forwards" in row else part


def table(search: Ratios, fresh: Ratios) -> str:
    """Geometric means over seeds."""
    cells = sorted(fresh[BASE])
    names = [f"{name} {bpe:g}" for name, bpe in cells]
    seeds = [len(fresh[BASE][cell]) for cell in cells]
    heads = [f"{n}, {s} seeds: search | fresh" for n, s in zip(names, seeds, strict=True)]
    lines = [f"| part | {' | '.join(heads)} |", "|---|" + "---:|---:|" * len(cells)]
    for part, by_cell in fresh.items():
        means = [
            f"{geometric(search[part][cell]):.3f} | {geometric(by_cell[cell]):.3f}"
            for cell in cells
        ]
        lines.append(f"| {part} | {' | '.join(means)} |")
    return "\n".join(lines)


def draw(fresh: Ratios, path: Path) -> None:
    """Every seed's ratio on fresh tokens, by part."""
    from matplotlib.figure import Figure

    parts = [part for part in fresh if part != BASE]
    figure = Figure(figsize=(9, 0.24 * len(parts) + 1), layout="constrained")
    axes = figure.add_subplot()
    for shift, cell in enumerate(sorted(fresh[BASE])):
        points = [
            (value, row + 0.16 * shift - 0.24)
            for row, part in enumerate(parts)
            for value in fresh[part][cell]
        ]
        axes.plot(
            *zip(*points, strict=True), "o", markersize=3, alpha=0.7, label=f"{cell[0]} {cell[1]:g}"
        )
    axes.axvline(1.0, color="0.5", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([0.9, 1.0, 1.1, 1.3, 1.6], ["0.9", "1.0", "1.1", "1.3", "1.6"])
    axes.minorticks_off()
    axes.set_yticks(range(len(parts)), parts, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("KL on fresh tokens / that of the solver's optimum")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
