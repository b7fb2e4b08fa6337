"""The table and the picture of what was measured, from files of results alone.

    python -m experiments.evidence.summary experiments/vs_modelopt/results \
        experiments/evidence/results --picture experiments/evidence/kl.png

Files are those of `experiments.vs_modelopt` (ours beside ModelOpt's picks), of
`experiments.evidence.judge` (ours beside checkpoints of other tools) and of
`experiments.evidence.collect` (tasks). What is worse than the best peer is listed with its reason
from `reasons.yaml`; one that has no reason there ends the script with an error. What could not be
run stands there too.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from autoquant.modelopt.peer import METHODS

REASONS = Path(__file__).with_name("reasons.yaml")
OURS = "AutoQuant"

Cell = tuple[str, str, float]
"""Model, what is quantized (w4a4, w4a16), and the budget in bits per element."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender in one cell with one seed."""

    cell: Cell
    who: str
    seed: int
    kl: float
    """Mean on fresh tokens, nats per token."""
    bytes: int | None
    seconds: float | None
    is_peer: bool
    """Whether it searches, as fixed recipes do not."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path, required=True)
    arguments = parser.parse_args()
    files = [file for folder in arguments.folders for file in sorted(folder.glob("*.json"))]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    rows = [row for result in results if "cells" in result for row in rows_of(result)]
    tasks = [result for result in results if result.get("kind") == "tasks"]
    reasons = yaml.safe_load(REASONS.read_text(encoding="utf-8"))
    worse, left_out = reasons["worse"], reasons["not run"]
    parts = (
        ratio_table(rows),
        kl_table(rows),
        task_table(tasks),
        position_table(tasks),
        worse_table(rows, worse),
    )
    for part in filter(None, parts):
        print(part, end="\n\n")
    for name, reason in left_out.items():
        print(f"- not run: {name}: {reason}")
    draw(rows, arguments.picture)


def rows_of(result: Mapping[str, Any]) -> Iterator[Row]:
    """The contenders of a file of `experiments.vs_modelopt`, in either of its forms."""
    mode, seed = result.get("mode", "w4a4"), result["seed"]
    for cell in result["cells"]:
        place = (result["subject"], mode, float(cell["budget_bpe"]))
        for name, found in cell["modelopt"].items():
            best = min(found, key=_kl, default=None) if isinstance(found, list) else found
            if best is not None:
                seconds = best.get("seconds", _older_seconds(result, name))
                yield _row(place, f"ModelOpt {name}", seed, best, seconds, is_peer=True)
        for name, found in cell.get("peers", {}).items():
            yield _row(place, name, seed, found, found["seconds"], is_peer=True)
        for name, kl in cell.get("baselines", {}).items():
            yield _row(place, name, seed, {"kl": kl}, None, is_peer=False)
        ours = cell.get("autoquant", {})
        ours = ours.get("all", ours)
        if ours:
            seconds = ours["seconds"]
            total = seconds["total"] if isinstance(seconds, Mapping) else seconds
            yield _row(place, OURS, seed, ours, total, is_peer=False)


def _kl(row: Mapping[str, Any]) -> float:
    return float(row["kl"])


def _older_seconds(result: Mapping[str, Any], method: str) -> float | None:
    seconds = result.get("modelopt_seconds", {}).get(method)
    return None if seconds is None else seconds["calibrate and score"] + seconds["solve"]


def _row(
    cell: Cell,
    who: str,
    seed: int,
    found: Mapping[str, Any],
    seconds: float | None,
    *,
    is_peer: bool,
) -> Row:
    return Row(
        cell=cell,
        who=who,
        seed=seed,
        kl=float(found["kl"]),
        bytes=found.get("checkpoint_bytes"),
        seconds=seconds,
        is_peer=is_peer,
    )


def by_cell(rows: Iterable[Row]) -> dict[Cell, dict[str, list[Row]]]:
    """Rows of each cell by contender, ours first, then by their KL."""
    cells: dict[Cell, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row.cell][row.who].append(row)
    ordered = {}
    for cell, found in sorted(cells.items()):
        names = sorted(found, key=lambda who: (who != OURS, geometric(_kls(found[who]))))
        ordered[cell] = {who: found[who] for who in names}
    return ordered


def ratios(found: Mapping[str, Sequence[Row]]) -> dict[int, tuple[float, str]]:
    """Our KL over that of the best peer with each seed, and who that is."""
    peers: dict[int, Row] = {}
    for row in (row for rows in found.values() for row in rows if row.is_peer):
        if row.seed not in peers or row.kl < peers[row.seed].kl:
            peers[row.seed] = row
    ours = {row.seed: row.kl for row in found.get(OURS, ())}
    return {
        seed: (kl / peers[seed].kl, peers[seed].who) for seed, kl in ours.items() if seed in peers
    }


def kl_table(rows: Iterable[Row]) -> str:
    """Every contender in every cell: KL over seeds, ours over the best peer's, bytes, seconds."""
    lines = [
        "| model | mode | bits | assignment | KL | seeds | ours over the best peer's | bytes "
        "| seconds |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    pooled = []
    for cell, found in by_cell(rows).items():
        own = [ratio for ratio, _ in ratios(found).values()]
        pooled += own
        for who, same in found.items():
            shown = f"{geometric(own):.3f} (worst {max(own):.3f})" if who == OURS and own else ""
            lines.append(
                f"| {cell[0]} | {cell[1]} | {cell[2]:g} | {who} | {geometric(_kls(same)):.5f} "
                f"| {len(same)} | {shown} | {_mean([row.bytes for row in same])} "
                f"| {_median([row.seconds for row in same])} |"
            )
    if pooled:
        lines.append(
            f"| all | | | {OURS} | | {len(pooled)} | {geometric(pooled):.3f} "
            f"(worst {max(pooled):.3f}) | | |"
        )
    return "\n".join(lines)


def ratio_table(rows: Iterable[Row]) -> str:
    """Ours beside the peer that is best in each cell, over the same seeds."""
    lines = [
        "| model | mode | bits | seeds | AutoQuant | best peer | whose KL | ratio | worst |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    pooled: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (model, mode, bits), found in by_cell(rows).items():
        own = ratios(found)
        if not own:
            continue
        of_cell = [ratio for ratio, _ in own.values()]
        pooled[model, mode] += of_cell
        best = " or ".join(sorted({who for _, who in own.values()}))
        ours = geometric([row.kl for row in found[OURS] if row.seed in own])
        lines.append(
            f"| {model} | {mode} | {bits:g} | {len(own)} | {ours:.5f} | {best} "
            f"| {ours / geometric(of_cell):.5f} | {geometric(of_cell):.3f} | {max(of_cell):.3f} |"
        )
    for (model, mode), found_ratios in pooled.items():
        lines.append(
            f"| {model} | {mode} | all | {len(found_ratios)} | | | | {geometric(found_ratios):.3f} "
            f"| {max(found_ratios):.3f} |"
        )
    return "\n".join(lines)


def task_table(results: Iterable[Mapping[str, Any]]) -> str:
    """Tasks of each assignment beside its KL; differences to BF16 on the same items."""
    lines = [
        "| model | asked bits | assignment | stored bits | KL | task | figure | value | s.e. "
        "| to BF16, 95 % | items |",
        "|---|---:|---|---:|---:|---|---|---:|---:|---:|---:|",
    ]
    for result in results:
        for row in result["tasks"]["rows"]:
            paired = row["to_bf16"]
            shown = (
                ""
                if paired is None
                else f"{paired['mean']:+.4f} ({paired['low']:+.4f} to {paired['high']:+.4f})"
            )
            stderr = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
            kl = "-" if row["kl"] is None else f"{row['kl']:.5f}"
            lines.append(
                f"| {result['subject']} | {result['budget_bpe']:g} | {row['name']} "
                f"| {row['bpe']:.3f} | {kl} | {row['task']} | {row['metric']} "
                f"| {row['value']:.4f} | {stderr} | {shown} | {row['items']:,} |"
            )
    return "\n".join(lines)


def position_table(results: Iterable[Mapping[str, Any]]) -> str:
    """KL by position of the winners and the recipes; nothing where it was not measured."""
    lines = []
    for result in results:
        for row in result["by_position"]:
            shown = " | ".join(f"{bucket['kl']:.5f}" for bucket in row["buckets"])
            if not lines:
                places = (f"{b['first']} to {b['last']}" for b in row["buckets"])
                lines = [
                    f"| model | asked bits | assignment | {' | '.join(places)} |",
                    "|---|---:|---|" + "---:|" * len(row["buckets"]),
                ]
            asked = f"{result['budget_bpe']:g}"
            lines.append(f"| {result['subject']} | {asked} | {row['name']} | {shown} |")
    return "\n".join(lines)


def worse_table(rows: Iterable[Row], reasons: Mapping[str, str]) -> str:
    """Where we are above the best peer, and why.

    Raises:
        SystemExit: there is no reason for one of them.
    """
    lines = [
        "| worse than the best peer | seed | ratio | peer | reason |",
        "|---|---:|---:|---|---|",
    ]
    for cell, found in by_cell(rows).items():
        for seed, (ratio, peer) in sorted(ratios(found).items()):
            if ratio <= 1.0:
                continue
            name = f"{cell[0]} {cell[1]} {cell[2]:g}"
            if name not in reasons:
                raise SystemExit(
                    f"{name} (seed {seed}) is {ratio:.3f} of {peer}: say why in {REASONS}"
                )
            lines.append(f"| {name} | {seed} | {ratio:.3f} | {peer} | {reasons[name]} |")
    return "\n".join(lines) if len(lines) > 2 else "No cell is worse than its best peer."


def draw(rows: Iterable[Row], path: Path) -> None:
    """KL against bits, a panel for each model and mode; means over seeds.

    Of a peer's methods the better one in each cell.
    """
    from matplotlib.figure import Figure

    curves: dict[tuple[str, str], dict[str, dict[float, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for (model, mode, bpe), found in by_cell(rows).items():
        for who, same in found.items():
            curve, kl = curves[model, mode][_without_method(who)], geometric(_kls(same))
            curve[bpe] = min(kl, curve.get(bpe, kl))
    names = list(dict.fromkeys(who for found in curves.values() for who in found))
    figure = Figure(figsize=(3.4 * max(1, len(curves)), 4.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(curves)), squeeze=False)[0]
    for axes, ((model, mode), found) in zip(panels, curves.items(), strict=False):
        for who, points in found.items():
            number = names.index(who)
            axes.plot(
                *zip(*points.items(), strict=True),
                marker="os^DvPX"[number % 7],
                color=f"C{number % 10}",
                linewidth=2 if who == OURS else 1,
                label=who,
            )
        axes.set_yscale("log")
        axes.set_title(f"{model}, {mode}", fontsize=9)
        axes.set_xlabel("bits per element (budget)")
    panels[0].set_ylabel("KL, nats per token")
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def _without_method(who: str) -> str:
    """A preset of ModelOpt, without which of its methods chose."""
    preset, _, method = who.rpartition(" ")
    return preset if method in METHODS else who


def _kls(rows: Iterable[Row]) -> list[float]:
    return [row.kl for row in rows]


def geometric(values: Sequence[float]) -> float:
    return math.exp(fmean(math.log(value) for value in values))


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):,.0f}" if known else "-"


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.1f}" if known else "-"


if __name__ == "__main__":
    main()
