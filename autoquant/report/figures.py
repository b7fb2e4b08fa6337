"""Pictures of what was measured: KL against size, against its prediction, over time, per token."""

import math
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from autoquant.decimals import shortest
from autoquant.measure.uncertainty import NORMAL_95
from autoquant.report.record import RunRecord, TrialRow
from autoquant.report.style import LIGHT, new_figure, plain_log, powers_of_ten
from autoquant.report.words import counts_stored_bits, rank_correlation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGES = ("baseline", "solver", "rules", "runner-up", "reweight", "refit", "swap")

_LEAST_NEAR = 4
"""Candidates that are worth a panel of their own."""

_HISTOGRAM_COLORS = ("accent", "swap", "runner-up", "reweight", "baseline", "ink", "refit")
"""The winner's first."""

_MARKERS = ("s", "D", "^", "v", "P", "X", "h", "<", ">")


def frontier(record: RunRecord) -> "Figure":
    """KL against BPE: what was confirmed on the report split, and all that the search measured."""
    near = [t for t in record.trials if t.is_eligible and t.stage != "baseline"]
    rows = ["wwwww"] if record.result is not None else []
    rows += ["aaann" if len(near) >= _LEAST_NEAR else "aaaaa"]
    figure = new_figure(6.2, 1.0 + 2.9 * len(rows))
    panels: dict[str, Axes] = figure.subplot_mosaic([list(row) for row in rows])
    if record.result is not None:
        _draw_confirmed(panels["w"], record.result)
    _draw_trials(panels["a"], record)
    for name in panels.keys() - {"n"}:
        _draw_budget(panels[name], record)
        panels[name].set_xlabel("bits per element")
        panels[name].set_ylabel("KL, nats per token")
    if "n" in panels:
        _draw_near(panels["n"], near)
    for each in panels.values():
        plain_log(each, "y")
    _legend(figure, panels.values(), columns=2)
    return figure


def prediction(record: RunRecord) -> "Figure":
    """Measured KL against the sum of the groups' own, and against the fit to measured assignments.

    Both of the assignments that `predictions` of `result.json` is about, so that the errors are
    those of its `relative_error`. Before the search is finished the second panel shows the sum
    again, of the candidates alone.
    """
    figure = new_figure(6.2, 3.5)
    alone, joint = figure.subplots(1, 2)
    fitted = [t for t in record.trials if t.joint_kl is not None]
    shown = fitted or [t for t in record.trials if not t.is_stopped]
    _draw_prediction(alone, shown, lambda t: t.predicted_kl, "sum of the groups' own KL")
    if fitted:
        _draw_prediction(joint, fitted, lambda t: t.joint_kl, "fit to the measured assignments")
    else:
        near = [t for t in shown if t.fits and t.stage != "baseline"]
        _draw_prediction(joint, near, lambda t: t.predicted_kl, "the same, candidates")
    alone.set_ylabel("measured KL, nats per token")
    _legend(figure, [alone, joint], columns=3)
    return figure


def _draw_prediction(axes: "Axes", trials: Sequence[TrialRow], predicted: Any, label: str) -> None:
    shown = [t for t in trials if 0 < predicted(t) < math.inf and 0 < t.kl < math.inf]
    _scatter(axes, shown, predicted)
    if shown:
        low = max(min(map(predicted, shown)), min(t.kl for t in shown))
        high = min(max(map(predicted, shown)), max(t.kl for t in shown))
        if low < high:
            axes.plot([low, high], [low, high], color=LIGHT["muted"], lw=1, label="equal")
    plain_log(axes, "x")
    plain_log(axes, "y")
    if shown:
        error = sum(abs(predicted(t) - t.kl) / t.kl for t in shown) / len(shown)
        rank = rank_correlation([predicted(t) for t in shown], [t.kl for t in shown])
        ordered = "" if rank is None else f", rank {rank:.2f}"
        axes.set_title(f"off by {100 * error:.1f} %{ordered}", fontsize=9.5)
    axes.set_xlabel(label)


def convergence(record: RunRecord) -> "Figure":
    """KL of each trial in the order measured, and the best so far that keeps the budget."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(6.2, 3.4)
    axes = figure.subplots()
    _scatter(axes, record.trials, lambda trial: trial.number)
    best: list[tuple[int, float]] = []
    for trial in record.trials:
        if trial.is_eligible and (not best or trial.kl < best[-1][1]):
            best.append((trial.number, trial.kl))
    if best:
        best.append((record.trials[-1].number, best[-1][1]))
        axes.step(*zip(*best, strict=True), where="post", color=LIGHT["ink"], label="best so far")
    plain_log(axes, "y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial")
    axes.set_ylabel("KL on search tokens, nats")
    _legend(figure, [axes], columns=3)
    return figure


def tokens(record: RunRecord) -> "Figure":
    """Share of tokens by their KL, of the winner and of the baselines, on the report split."""
    figure = new_figure(6.2, 3.3)
    axes = figure.subplots()
    stored = record.tokens or {"histograms": [], "edges": [1e-9, 1.0]}
    edges = stored["edges"]
    for row, color in zip(stored["histograms"], cycle(_HISTOGRAM_COLORS), strict=False):
        total = max(1, sum(row["counts"]))
        shares = [100 * count / total for count in row["counts"]]
        is_winner = row is stored["histograms"][0]
        if is_winner:
            axes.stairs(shares, edges, fill=True, color=LIGHT[color], alpha=0.35)
        axes.stairs(
            shares, edges, color=LIGHT[color], lw=1.6 if is_winner else 1, label=row["name"]
        )
    if record.result is not None:
        kl = record.result["kl"]
        for name, dash in (("median", ":"), ("mean", "-"), ("p99", "--")):
            if kl[name]:
                axes.axvline(kl[name], color=LIGHT["ink"], lw=1, ls=dash, label=f"{name}, winner")
    powers_of_ten(axes, "x")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("KL of a token, nats (the first bin holds all below)")
    axes.set_ylabel("% of tokens")
    _legend(figure, [axes], columns=2)
    return figure


def _draw_confirmed(axes: "Axes", result: dict[str, Any]) -> None:
    axes.set_title("Confirmed on fresh tokens (bars: 95 % interval)")
    for row in result["finalists"]:
        if row["trial"] != result["winner"]["trial"]:
            _draw_bar(axes, row, "o", LIGHT["runner-up"], "other finalists", filled=False)
    for row, marker in zip(result["baselines"], _MARKERS * 3, strict=False):
        _draw_bar(axes, row, marker, LIGHT["baseline"], row["name"], filled=row["fits"])
    winner = {"bpe": result["bpe"]["checkpoint"], "kl": result["kl"]["mean"]}
    winner["stderr"] = result["kl"]["stderr"]
    _draw_bar(axes, winner, "*", LIGHT["accent"], "the winner", filled=True, size=11)


def _draw_bar(
    axes: "Axes",
    row: dict[str, Any],
    marker: str,
    color: str,
    label: str,
    *,
    filled: bool,
    size: float = 6.5,
) -> None:
    axes.errorbar(
        row["bpe"],
        row["kl"],
        yerr=None if row["stderr"] is None else NORMAL_95 * row["stderr"],
        fmt=marker,
        ms=size,
        color=color,
        mfc=color if filled else "none",
        capsize=3,
        lw=1,
        label=label,
    )


def _draw_trials(axes: "Axes", record: RunRecord) -> None:
    from matplotlib.lines import Line2D

    axes.set_title("Every assignment, on search tokens")
    _scatter(axes, record.trials, lambda trial: trial.bpe)
    front = sorted((t for t in record.trials if t.is_frontier), key=lambda t: t.bpe)
    if front:
        axes.step(
            [t.bpe for t in front],
            [t.kl for t in front],
            where="post",
            color=LIGHT["ink"],
            lw=1,
            label="frontier",
        )
    predicted = (record.result or {}).get("predictions", {}).get("frontier")
    if predicted:  # as an artist, which leaves the limits to what was measured
        axes.add_artist(
            Line2D(
                [row["bpe"] for row in predicted],
                [row["kl"] for row in predicted],
                color=LIGHT["muted"],
                lw=1,
                ls=":",
                label="predicted for other budgets",
            )
        )


def _draw_near(axes: "Axes", trials: Sequence[TrialRow]) -> None:
    """The candidates by stage: they fill the budget alike, and so are one spot among all trials."""
    stages = [stage for stage in STAGES if any(trial.stage == stage for trial in trials)]
    stages += sorted({trial.stage for trial in trials} - {*stages})
    places: dict[int, float] = {}
    for place, stage in enumerate(stages):
        rows = [trial for trial in trials if trial.stage == stage]
        for index, trial in enumerate(rows):
            places[trial.number] = place + 0.7 * ((index + 0.5) / len(rows) - 0.5)
    _scatter(axes, trials, lambda trial: places[trial.number])
    best = min(trials, key=lambda trial: trial.kl)
    if best.stderr is not None:
        half = NORMAL_95 * best.stderr
        axes.errorbar(
            places[best.number], best.kl, half, capsize=3, lw=1, color=LIGHT["ink"], zorder=1
        )
    axes.set_title("Candidates, closer")
    axes.set_xticks(range(len(stages)), stages, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlabel("stage (bar: 95 %)")


def _draw_budget(axes: "Axes", record: RunRecord) -> None:
    """The budget, where it counts what the axis does: stored bits of the whole checkpoint."""
    settings = record.identity["signature"]
    budget = settings.get("budget_bpe")
    if budget and counts_stored_bits(settings):
        axes.axvline(budget, color=LIGHT["ink"], lw=1, ls="--", label=f"budget {shortest(budget)}")


def _scatter(axes: "Axes", trials: Sequence[TrialRow], x: Any) -> None:
    """Trials against `x`, coloured by stage; hollow over the budget, crosses if stopped early."""
    for stage in dict.fromkeys([*STAGES, *(trial.stage for trial in trials)]):
        color = LIGHT.get(stage, LIGHT["other"])
        rows = [trial for trial in trials if trial.stage == stage and not trial.is_stopped]
        if rows:
            marker = "D" if stage == "solver" else "o"
            axes.scatter(
                [x(trial) for trial in rows],
                [trial.kl for trial in rows],
                s=34 if stage in ("baseline", "solver") else 20,
                marker=marker,
                facecolors=[color if trial.fits else "none" for trial in rows],
                edgecolors=color,
                linewidths=1,
                zorder=3 if stage == "solver" else 2,
            )
            axes.scatter([], [], s=28, marker=marker, color=color, label=stage)
    stopped = [trial for trial in trials if trial.is_stopped]
    if stopped:
        axes.scatter(
            [x(trial) for trial in stopped],
            [trial.kl for trial in stopped],
            s=12,
            marker="x",
            color=LIGHT["other"],
            linewidths=1,
            label="stopped early",
        )
    if any(not trial.fits for trial in trials):
        axes.scatter(
            [], [], s=28, facecolors="none", edgecolors=LIGHT["baseline"], label="over the budget"
        )


def _legend(figure: "Figure", axes: Iterable["Axes"], *, columns: int) -> None:
    """One legend below all axes, each label once."""
    found: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=columns,
        handletextpad=0.4,
    )
