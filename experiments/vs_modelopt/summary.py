"""Join the results of every subject and seed into one table and one picture.

python -m experiments.vs_modelopt.summary experiments/vs_modelopt/results
"""

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Key = tuple[str, float]
RULES = ("all", "max")


def main() -> None:
    folder = Path(sys.argv[1])
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    timed = [json.loads(path.read_text()) for path in sorted((folder / "times").glob("*.json"))]
    ratios = {rules: by_cell(results, rules) for rules in RULES}
    for part in (table(ratios), stages(results), times(timed)):
        print(part, end="\n\n")
    draw(ratios, folder / "ratios.png")


def by_cell(results: Iterable[dict[str, Any]], rules: str) -> dict[Key, list[float]]:
    """Ratios to the better peer, one for each seed."""
    cells: dict[Key, list[float]] = defaultdict(list)
    for result in results:
        for cell in result["cells"]:
            ratio = cell["autoquant"][rules]["to_peer"]["ratio"]
            cells[result["subject"], cell["budget_bpe"]].append(ratio)
    return dict(sorted(cells.items()))


def geometric(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def table(ratios: dict[str, dict[Key, list[float]]]) -> str:
    """Geometric mean and worst ratio of each cell, and of all runs."""
    lines = [
        "| model | bits per element | seeds | scale rules on | worst | `max` only | worst |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, bpe), values in ratios["all"].items():
        other = ratios["max"][name, bpe]
        lines.append(
            f"| {name} | {bpe} | {len(values)} | {geometric(values):.3f} | {max(values):.3f} "
            f"| {geometric(other):.3f} | {max(other):.3f} |"
        )
    pooled = {rules: [v for own in cells.values() for v in own] for rules, cells in ratios.items()}
    shown = " | ".join(f"{geometric(v):.3f} | {max(v):.3f}" for v in pooled.values())
    return "\n".join([*lines, f"| all | | {len(pooled['all'])} | {shown} |"])


def stages(results: Iterable[dict[str, Any]]) -> str:
    """What each stage of the searches measured, lowered the search KL by, and how often it won."""
    runs = [cell["autoquant"][rules] for r in results for cell in r["cells"] for rules in RULES]
    rows: dict[str, list[float]] = {}
    for run in runs:
        for stage in run["stages"]:
            row = rows.setdefault(stage["stage"], [0, 0, 0.0, 0.0])
            row[0] += stage["trials"]
            row[1] += stage["stopped"]
            row[2] += stage["gain"] / run["kl"] / len(runs)
            row[3] += stage["tokens"]
    wins = Counter(run["winner"]["stage"] for run in runs)
    tokens = sum(row[3] for row in rows.values())
    lines = [
        f"| stage, {len(runs)} searches | measured | stopped early | tokens | search KL lowered by "
        "| confirmed winner |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, (trials, stopped, gain, seen) in rows.items():
        share = f"{seen / tokens:.0%}"
        lines.append(
            f"| {name} | {trials} | {stopped} | {share} | {gain:.2%} | {wins.get(name, 0)} |"
        )
    return "\n".join(lines)


def times(results: Iterable[dict[str, Any]]) -> str:
    """Seconds of searches and of the peer, one after the other on the same machine."""
    lines = [
        "| model | groups | default: probes | whole | `max` only: probes "
        "| whole | `gradient`, no trials: probes | whole | ModelOpt `kl_div` scores "
        "| `gradient` scores | `gradient` whole |",
        "|---|---:|" + "---:|" * 9,
    ]
    for result in results:
        ours, peer = result["autoquant"], result["modelopt"]
        cells = [
            seconds
            for name in ("default", "max only", "gradient, no trials")
            for seconds in (ours[name]["probe"], ours[name]["total"])
        ]
        gradient = peer["gradient"]
        cells += [peer["kl_div"]["score"], gradient["score"]]
        cells.append(gradient["calibrate and score"] + gradient["solve"])
        row = " | ".join(f"{seconds:.1f}" for seconds in cells)
        lines.append(f"| {result['subject']} | {result['groups']} | {row} |")
    return "\n".join(lines)


def draw(ratios: dict[str, dict[Key, list[float]]], path: Path) -> None:
    """Every run's ratio, by cell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{name}\n{bpe:g}" for name, bpe in ratios["all"]]
    for shift, (rules, label) in enumerate((("all", "scale rules on"), ("max", "max only"))):
        places = [
            (i + 0.2 * shift - 0.1, v) for i, c in enumerate(ratios[rules].values()) for v in c
        ]
        axes.plot(*zip(*places, strict=True), "o", alpha=0.6, label=label)
    axes.axhline(1.0, color="0.5", linewidth=1)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("KL / better ModelOpt method")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
