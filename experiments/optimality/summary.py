"""One table and one picture of all subjects, scale rules and budgets.

python -m experiments.optimality.summary experiments/optimality/results
"""

import json
import sys
from pathlib import Path
from typing import Any

PREDICTORS = {
    "sum": "sum of groups",
    "sum_mapped": "fitted, no interactions",
    "interactions": "fitted",
    "refitted": "refitted",
}


def main() -> None:
    folder = Path(sys.argv[1])
    cells = [
        {"subject": result["subject"], **cell}
        for result in (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
        for cell in result["cells"]
    ]
    print(table(cells))
    draw(cells, folder / "predictions.png")


def table(cells: list[dict[str, Any]]) -> str:
    lines = [
        "| model | bits per element | scale rules | fill the budget | search / optimum | random | "
        + " | ".join(PREDICTORS.values())
        + " | Spearman |",
        "|---|---:|---|---:|---:|---:|" + "---:|" * (len(PREDICTORS) + 1),
    ]
    for cell in cells:
        optimum, random = cell["optimum"], cell["prediction"]
        ratio = f"{cell['searched']['kl'] / optimum['kl']:.3f}" if optimum["kl"] else ""
        known = [random[name] for name in PREDICTORS if name in random]
        errors = [f"{100 * found['relative_error']:.1f} %" for found in known] or [""] * 4
        spearman = f"{random['interactions']['spearman']:.2f}" if known else ""
        shown = " | ".join([*errors, spearman])
        lines.append(
            f"| {cell['subject']} | {cell['budget_bpe']} | {cell['rules']} "
            f"| {optimum['assignments']} | {ratio} | {random['assignments']} | {shown} |"
        )
    return "\n".join(lines)


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Mean error of every predictor on random assignments, by cell."""
    from matplotlib.figure import Figure

    drawn = [cell for cell in cells if "interactions" in cell["prediction"]]
    names = [f"{c['subject']}\n{c['budget_bpe']:g} {c['rules']}" for c in drawn]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, label in PREDICTORS.items():
        errors = [100 * cell["prediction"][name]["relative_error"] for cell in drawn]
        axes.plot(range(len(drawn)), errors, "o", alpha=0.7, label=label)
    axes.axhline(5.0, color="0.5", linewidth=1)
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_ylabel("predicted KL off by, %")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.15))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
