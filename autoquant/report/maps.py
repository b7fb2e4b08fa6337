"""Pictures of the model: formats by layer and role, sensitivities, expert coverage, bytes."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autoquant.formats import Choice, all_formats, choices_of
from autoquant.report.record import GroupRow, RunRecord
from autoquant.report.style import LIGHT, RAMP, new_figure, sign_marker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch


def forms() -> dict[str, str]:
    """How checkpoints can declare a layer (`nvfp4`, `nvfp4/a16`, ...), and what people call it."""
    choices = [choice for format in all_formats() for choice in choices_of(format)]
    return {
        choice.form: choice.format.label + (", BF16 inputs" if choice.input else "")
        for choice in choices
    }


def _sign(form: str) -> str:
    """What a cell of the map says: whole bits of a weight, and `a16` for BF16 inputs."""
    choice = Choice.parse(form)
    return choice.input or str(int(choice.format.weight_bits))


_LEAST_ROW = 0.13
"""Inches; a row of less has no room for a sign in its cells."""

Cell = tuple[int, int]
"""Row (layer) and column (role)."""


def format_map(record: RunRecord) -> "Figure":
    """Formats of the best assignment by layer and role, and the KL of the smallest format there."""
    figure = new_figure(6.2, _height(record.groups))
    parts = figure.subfigures(1, 2, width_ratios=(1.08, 1), squeeze=False)
    left, right = parts[0]
    chosen, sensitive = left.subplots(), right.subplots()
    _draw_formats(chosen, record.groups)
    _draw_sensitivity(sensitive, record)
    chosen.set_ylabel("layer")
    sensitive.tick_params(labelleft=False)  # the same rows
    for part in (left, right):
        if part.axes[0].get_legend_handles_labels()[0]:
            part.legend(loc="outside lower center", ncols=3, handlelength=1, columnspacing=1.2)
    return figure


def sensitivity(record: RunRecord) -> "Figure":
    """KL of each group alone in its smallest format, most sensitive first."""
    found = ((record.cheapest_kl.get(group.name, math.nan), group) for group in record.groups)
    rows = sorted((row for row in found if math.isfinite(row[0])), key=lambda row: -row[0])[:30]
    figure = new_figure(6.2, 1.1 + 0.19 * max(3, len(rows)))
    axes = figure.subplots()
    for index, (kl, group) in enumerate(rows):
        axes.barh(index, kl, color=_color(group), height=0.75)
    axes.set_yticks(range(len(rows)), [group.name for _, group in rows], fontsize=7.5)
    axes.set_ylim(max(3, len(rows)) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"The {len(rows)} most sensitive groups")
    axes.set_xlabel("KL alone in its smallest format*, nats per token")
    _format_legend(figure, record.groups)
    return figure


def coverage(record: RunRecord) -> "Figure":
    """Calibration tokens per expert of each layer, relative to an even spread."""
    blocks: Mapping[str, Sequence[int]] = (record.calibration or {}).get("expert_tokens", {})
    figure = new_figure(6.2, 1.0 + max(0.13, min(0.24, 8 / max(1, len(blocks)))) * len(blocks))
    axes = figure.subplots()
    for index, tokens in enumerate(blocks.values()):
        even = max(1e-9, sum(tokens) / len(tokens))
        shares = sorted(count / even for count in tokens)
        reached = [share for share in shares if share > 0] or [1.0]
        axes.plot([reached[0], reached[-1]], [index, index], color=LIGHT["runner-up"], lw=2)
        axes.plot(_middle(shares) or reached[0], index, "o", ms=4, color=LIGHT["ink"])
        idle = shares.count(0)
        if idle:
            axes.annotate(
                f"{idle} idle",
                (1, index),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=LIGHT["accent"],
            )
    axes.axvline(1, color=LIGHT["muted"], lw=1, ls="--")
    step = max(1, len(blocks) // 24)
    names = _short_names(list(blocks))
    axes.set_yticks(range(0, len(blocks), step), names[::step])
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    axes.set_ylabel("layer")
    axes.set_xlabel("tokens of an expert / even share; line: least to most, dot: median")
    return figure


def sizes(record: RunRecord) -> "Figure":
    """Bytes of the best checkpoint by role and format; what no format touches is grey."""
    by_role: dict[str, Counter[str]] = {}
    for group in record.groups:
        if group.choice is not None and group.bytes is not None:
            by_role.setdefault(group.role, Counter())[_format(group)] += group.bytes
    fixed = (record.plan or {}).get("fixed", {})
    for reason, count in fixed.items():
        by_role.setdefault(reason, Counter())["other"] += count
    rows = sorted(by_role.items(), key=lambda row: -row[1].total())
    figure = new_figure(6.2, 1.1 + 0.27 * max(2, len(rows)))
    axes = figure.subplots()
    unit, scale = _unit(max((counts.total() for _, counts in rows), default=1))
    whole = sum(counts.total() for _, counts in rows)
    for index, (_, counts) in enumerate(rows):
        left = 0.0
        for name in (*forms(), "other"):
            axes.barh(index, counts[name] / scale, left=left, color=_hue(name), height=0.7)
            left += counts[name] / scale
        axes.annotate(
            f"{counts.total() / max(1, whole):.1%}",
            (left, index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(range(len(rows)), [_wrapped(name) for name, _ in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{unit} in the checkpoint")
    _format_legend(figure, record.groups, others=bool(fixed))
    return figure


def _draw_formats(axes: "Axes", groups: Sequence[GroupRow]) -> None:
    cells = _cells(groups)
    colors = {cell: _color(group) for cell, group in cells.items()}
    _draw_cells(axes, groups, colors)
    axes.set_title("format")
    if _row_height(groups) >= _LEAST_ROW:
        for name in forms():
            axes.plot(
                [column for (_, column), group in cells.items() if _format(group) == name],
                [row for (row, _), group in cells.items() if _format(group) == name],
                **sign_marker(_sign(name), height=5),
                ls="none",
                color=LIGHT.get(f"on-{_plain(name)}", LIGHT["ink"]),
                mew=0,
            )
    for name, label in forms().items():
        if any(_format(group) == name for group in groups):
            axes.bar(0, 0, color=_hue(name), label=label)


def _draw_sensitivity(axes: "Axes", record: RunRecord) -> None:
    """Sensitivities in seven steps of a logarithmic scale; a probe within noise is the lightest."""
    kl = {name: value for name, value in record.cheapest_kl.items() if 0 < value < math.inf}
    low, high = (min(kl.values()), max(kl.values())) if kl else (1.0, 1.0)
    low = max(low, high / 1e3)
    span = math.log(high / low) or 1.0

    def color(group: GroupRow) -> str:
        value = kl.get(group.name)
        if value is None:
            return "none"
        step = int(len(RAMP) * math.log(max(value, low) / low) / span)
        return RAMP[min(step, len(RAMP) - 1)]

    cells = _cells(record.groups)
    _draw_cells(axes, record.groups, {cell: color(group) for cell, group in cells.items()})
    axes.set_title("KL in the smallest format*, nats")
    for step in (0, 3, 6) if kl else ():
        edge = low * math.exp(span * step / len(RAMP))
        axes.bar(0, 0, color=RAMP[step], label=f"≥ {edge:.1g}")


def _draw_cells(axes: "Axes", groups: Sequence[GroupRow], colors: Mapping[Cell, str]) -> None:
    layers, columns = _layers(groups), _columns(groups)
    by_color: dict[str, list[Cell]] = {}
    for cell, color in colors.items():
        by_color.setdefault(color, []).append(cell)
    for color, cells in by_color.items():
        axes.add_patch(_squares(cells, color))
    axes.set_xlim(-0.5, max(1, len(columns)) - 0.5)
    axes.set_ylim(max(1, len(layers)) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(range(len(columns)), columns, fontsize=8.5)
    if len(columns) > 3:
        for label in axes.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
    step = max(1, math.ceil(len(layers) / 32))
    names = ["none" if layer is None else str(layer) for layer in layers]
    axes.set_yticks(range(0, len(layers), step), names[::step], fontsize=8.5)


def _squares(cells: Sequence[Cell], color: str) -> "PathPatch":
    """All cells of one colour as one mark, which keeps the file small."""
    import numpy as np
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners = np.array([(-0.46, -0.44), (0.46, -0.44), (0.46, 0.44), (-0.46, 0.44), (0, 0)])
    centres = np.array([(column, row) for row, column in cells], dtype=float)
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    path = Path((centres[:, None] + corners).reshape(-1, 2), codes * len(cells))
    return PathPatch(path, facecolor=color, edgecolor=LIGHT["grid"], linewidth=0.5)


def _cells(groups: Sequence[GroupRow]) -> dict[Cell, GroupRow]:
    rows = {layer: index for index, layer in enumerate(_layers(groups))}
    columns = {name: index for index, name in enumerate(_columns(groups))}
    return {
        (rows[group.layer], columns[column]): group
        for group, column in zip(groups, _column_of(groups), strict=True)
    }


def _layers(groups: Sequence[GroupRow]) -> list[int | None]:
    """Layers in order; what lies outside of them last."""
    found = {group.layer for group in groups}
    return [*sorted(layer for layer in found if layer is not None), *({None} & found)]


def _columns(groups: Sequence[GroupRow]) -> list[str]:
    return list(dict.fromkeys(_column_of(groups)))


def _column_of(groups: Sequence[GroupRow]) -> list[str]:
    """Role of each group, numbered where a layer has several of it."""
    seen: Counter[tuple[int | None, str]] = Counter()
    names = []
    for group in groups:
        seen[group.layer, group.role] += 1
        count = seen[group.layer, group.role]
        names.append(group.role if count == 1 else f"{group.role} {count}")
    return names


def _row_height(groups: Sequence[GroupRow]) -> float:
    """Inches: less for deeper models, so that the map stays on a page."""
    return min(0.22, 8.0 / max(1, len(_layers(groups))))


def _height(groups: Sequence[GroupRow]) -> float:
    return 1.5 + _row_height(groups) * max(4, len(_layers(groups)))


def _format(group: GroupRow) -> str:
    """What the group's choice is declared as; `other` where it has none."""
    return Choice.parse(group.choice).form if group.choice is not None else "other"


def _plain(form: str) -> str:
    return form.partition("/")[0]


def _hue(form: str) -> str:
    """The colour of a format, whatever its inputs; grey for one that has none."""
    return LIGHT.get(_plain(form), LIGHT["other"])


def _color(group: GroupRow) -> str:
    return _hue(_format(group)) if group.choice is not None else "none"


def _format_legend(figure: "Figure", groups: Sequence[GroupRow], *, others: bool = False) -> None:
    from matplotlib.patches import Patch

    present = {_format(group) for group in groups if group.choice is not None}
    handles = [
        Patch(color=_hue(name), label=label) for name, label in forms().items() if name in present
    ]
    if others:
        handles.append(Patch(color=LIGHT["other"], label="kept as it is"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, handlelength=1.1)


def _middle(shares: Sequence[float]) -> float:
    return shares[len(shares) // 2]


def _short_names(blocks: Sequence[str]) -> list[str]:
    """The number in each name, where every name has one of its own; else the name."""
    numbers = [next((p for p in name.split(".") if p.isdigit()), "") for name in blocks]
    return numbers if len(set(numbers)) == len(blocks) and all(numbers) else list(blocks)


def _unit(largest: float) -> tuple[str, float]:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if largest >= scale:
            return unit, scale
    return "kB", 1e3


def _wrapped(name: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(name, 26)[:2])
