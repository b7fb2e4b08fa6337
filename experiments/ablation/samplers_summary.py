"""One table and one picture of the comparison of samplers.

python -m experiments.ablation.samplers_summary experiments/ablation/results/samplers
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.ablation.samplers import SAMPLERS
from experiments.vs_modelopt.summary import geometric

TOKENS = ("search", "fresh")


@dataclass(frozen=True, slots=True)
class Reached:
    """What a sampler reached on a subject, a number for each seed."""

    measured: list[int] = field(default_factory=list)
    """Assignments, recipes and the solver's optima included."""
    search: list[float] = field(default_factory=list)
    """KL of its best over that of the solver's optimum, on search tokens."""
    fresh: list[float] = field(default_factory=list)
    confirmed: list[float] = field(default_factory=list)
    """On fresh tokens, of what the confirmation leaves."""


def main() -> None:
    folder = Path(sys.argv[1])
    found = reached(json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    print(table(found))
    draw(found, folder / "samplers.png")


def reached(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Reached]:
    """By subject with its forwards, and by sampler."""
    found: dict[tuple[str, str], Reached] = defaultdict(Reached)
    for result in results:
        rows = {row["part"]: row for row in result["rows"]}  # the last has the most forwards
        base = rows["optimum"]
        for sampler in (name for name in SAMPLERS if name in rows):
            best = rows[sampler]
            own = found[f"{result['subject']}, {best['forwards']}", sampler]
            own.measured.append(best["measured"])
            own.search.append(best["search_kl"] / base["search_kl"])
            own.fresh.append(best["fresh_kl"] / base["fresh_kl"])
            own.confirmed.append(rows[f"{sampler}, confirmed"]["fresh_kl"] / base["fresh_kl"])
    return found


def table(found: dict[tuple[str, str], Reached]) -> str:
    """Geometric means over seeds, and the range of what was measured."""
    lines = [
        "| model, forwards | `--sampler` | seeds | measured | search | fresh | confirmed |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (subject, sampler), own in found.items():
        few, many = min(own.measured), max(own.measured)
        means = [f"{geometric(each):.3f}" for each in (own.search, own.fresh, own.confirmed)]
        cells = [subject, f"`{sampler}`", str(len(own.fresh)), f"{few} to {many}", *means]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[tuple[str, str], Reached], path: Path) -> None:
    """Every seed's best on search tokens and on fresh ones."""
    from matplotlib.figure import Figure

    subjects = list(dict.fromkeys(subject for subject, _ in found))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for panel, name in zip(axes, TOKENS, strict=True):
        for shift, subject in enumerate(subjects):
            points = [
                (value, row + 0.16 * (shift - (len(subjects) - 1) / 2))
                for row, sampler in enumerate(SAMPLERS)
                if (subject, sampler) in found
                for value in getattr(found[subject, sampler], name)
            ]
            panel.plot(*zip(*points, strict=True), "o", markersize=4, alpha=0.7, label=subject)
        panel.axvline(1.0, color="0.5", linewidth=1)
        panel.set_yticks(range(len(SAMPLERS)), SAMPLERS)
        panel.set_xlabel(f"KL on {name} tokens / that of the solver's optimum")
    axes[0].invert_yaxis()
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
