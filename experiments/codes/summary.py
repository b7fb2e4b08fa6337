"""One table and one picture of the results of `run.py`.

python -m experiments.codes.summary experiments/codes/results
"""

import json
import sys
from pathlib import Path
from typing import Any

BASE = "nvfp4/max"
"""Every KL is shown over that of this choice on the same tokens."""


def main() -> None:
    folder = Path(sys.argv[1])
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    scores = {name: _scores(result) for name, result in results.items()}
    print(table(scores, results))
    draw(scores, folder / "codes.png")


def _scores(result: dict[str, Any]) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """Rows by choice, then by text (like the calibration or unlike it) and inputs."""
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["part"] == "score":
            text = "like" if row["text"] == result["settings"]["text"] else "unlike"
            found.setdefault(row["choice"], {})[text, row["mode"]] = row
    return found


def table(scores: dict[str, Any], results: dict[str, Any]) -> str:
    """KL and its ratio to the base for each model, and the seconds of encoding."""
    lines = []
    for name, of_model in scores.items():
        columns = list(of_model[BASE])
        seconds: dict[str, list[dict[str, Any]]] = {}
        for row in results[name]["rows"]:
            if row["part"] == "encode":  # refitted codes once for each mode
                seconds.setdefault(row["choice"], []).append(row)
        heads = [f"{text} text, {mode}" for text, mode in columns]
        lines += [f"\n{name}\n", f"| codes | {' | '.join(heads)} | seconds | plain |"]
        lines.append("|---|" + "---:|" * (len(columns) + 2))
        for choice, row in of_model.items():
            cells = [_cell(row[column], of_model[BASE][column]) for column in columns]
            made = seconds[choice]
            took = " + ".join(f"{own['seconds']:.1f}" for own in made)
            plain = " + ".join(f"{own['plain']} of {own['linears']}" for own in made)
            lines.append(f"| `{choice}` | {' | '.join(cells)} | {took} | {plain} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], base: dict[str, Any]) -> str:
    return f"{row['kl']:.4f} ± {row['stderr']:.4f} ({row['kl'] / base['kl']:.2f})"


def draw(scores: dict[str, Any], path: Path) -> None:
    """The ratio of each choice to the base, a panel for each model."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(scores), figsize=(5 * len(scores), 3.6), sharex=True, squeeze=False
    )
    for axes, (name, of_model) in zip(panels[0], scores.items(), strict=True):
        columns = list(of_model[BASE])
        choices = [choice for choice in of_model if choice != BASE]
        height = 0.8 / len(columns)
        for number, column in enumerate(columns):
            ratios = [of_model[c][column]["kl"] / of_model[BASE][column]["kl"] for c in choices]
            places = [place + number * height for place in range(len(choices))]
            axes.barh(places, ratios, height, label=f"{column[0]} text, {column[1]}")
        middle = 0.4 - height / 2
        axes.set_yticks([place + middle for place in range(len(choices))], choices)
        axes.invert_yaxis()
        axes.set_title(name)
        axes.set_xlabel(f"KL over that of {BASE}")
        axes.axvline(1.0, color="black", linewidth=0.8)
    labelled = max(
        (axes.get_legend_handles_labels() for axes in panels[0]), key=lambda own: len(own[1])
    )
    figure.legend(*labelled, loc="lower center", ncols=len(labelled[1]), fontsize="small")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
