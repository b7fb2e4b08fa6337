"""The picture of KL by position."""

from itertools import cycle
from typing import TYPE_CHECKING

from autoquant.measure.uncertainty import NORMAL_95
from autoquant.report.record import RunRecord
from autoquant.report.style import LIGHT, new_figure, plain_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("accent", "swap", "runner-up", "reweight", "baseline", "ink")
"""The winner's first."""


def positions(record: RunRecord) -> "Figure":
    """Mean KL of each bucket of positions, of the winner and of the baselines."""
    figure = new_figure(6.2, 3.5)
    axes = figure.subplots()
    rows = (record.result or {}).get("by_position", [])
    for row, color in zip(rows, cycle(_COLORS), strict=False):
        buckets = [own for own in row["buckets"] if own["kl"] is not None]
        axes.errorbar(
            [(own["first"] + own["last"] + 1) / 2 for own in buckets],
            [own["kl"] for own in buckets],
            yerr=[NORMAL_95 * (own["stderr"] or 0.0) for own in buckets],
            color=LIGHT[color],
            marker="o",
            markersize=3,
            capsize=3,
            lw=1.6 if row is rows[0] else 1,
            label=row["name"],
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    plain_log(axes, "y")
    axes.set_xlabel("position in the sequence, tokens before it")
    axes.set_ylabel("KL, nats per token")
    figure.legend(loc="outside lower center", ncols=2, handletextpad=0.4)
    return figure
