"""Several runs side by side: models, budgets, seeds."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autoquant.evaluate.evaluated import WINNER
from autoquant.evaluate.scores import TaskRow
from autoquant.evaluate.scores import rows_of as rows_of_tasks
from autoquant.measure.uncertainty import NORMAL_95
from autoquant.report.html import template
from autoquant.report.record import RunRecord
from autoquant.report.style import LIGHT, PALETTE, new_figure, plain_log, project_style, to_svg
from autoquant.report.words import best_baseline, budget_note

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("solver", "runner-up", "reweight", "swap", "ink", "baseline")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One run in the table; what an unfinished run or one of another version lacks is None."""

    run: str
    status: str
    model: str
    budget_bpe: float | None
    activation_mode: str | None
    seed: int | None
    bpe: float | None
    kl: float | None
    """Mean on the report split, nats per token."""
    stderr: float | None
    baseline: str | None
    """The best fixed recipe within the budget."""
    baseline_kl: float | None
    top1_agreement: float | None
    checkpoint_bytes: int | None
    trials: int
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """What another program picked for a run's model, budget and tokens."""

    run: RunRecord
    method: str
    bpe: float
    checkpoint_bytes: int
    kl: float
    """Mean on the run's report split, nats per token."""
    stderr: float | None
    tried: int
    """Picks that were measured; the one of least KL is this."""
    seconds: float
    """That the program took."""
    groups: Mapping[str, str]
    """Group name to choice."""

    @property
    def name(self) -> str:
        return f"ModelOpt {self.method}"


def rows_of(records: Sequence[RunRecord], rivals: Sequence[Rival] = ()) -> list[RunRow]:
    """The runs' lines of the table, each with those of its rivals after it."""
    rows = []
    for record, label in zip(records, labels(records), strict=True):
        own = _row(record, label)
        rows.append(own)
        rows += [_rival_row(rival, own) for rival in rivals if rival.run is record]
    return rows


def _rival_row(rival: Rival, own: RunRow) -> RunRow:
    return replace(
        own,
        run=f"{own.run}: {rival.name}",
        bpe=rival.bpe,
        kl=rival.kl,
        stderr=rival.stderr,
        baseline=None,
        baseline_kl=None,
        top1_agreement=None,
        checkpoint_bytes=rival.checkpoint_bytes,
        trials=rival.tried,
        seconds=rival.seconds,
    )


def labels(records: Sequence[RunRecord]) -> list[str]:
    """Each run's name, after as many of the folders it lies in as tell it from the others."""
    folders = [record.path.resolve() for record in records]
    return [_label(path, {*folders} - {path}) for path in folders]


def _label(path: Path, others: Collection[Path]) -> str:
    for depth in range(1, len(path.parts)):
        ending = path.parts[-depth:]
        if all(other.parts[-depth:] != ending for other in others):
            return "/".join(ending)
    return str(path)


def _row(record: RunRecord, label: str) -> RunRow:
    signature, result = record.identity["signature"], record.result
    rival = best_baseline(result) if result is not None else None
    return RunRow(
        run=label,
        status=str(record.status),
        model=(record.plan or {}).get("model") or signature.get("model", "?")[:16],
        budget_bpe=signature.get("budget_bpe"),
        activation_mode=signature.get("activation_mode"),
        seed=signature.get("seed"),
        bpe=result["bpe"]["checkpoint"] if result else None,
        kl=result["kl"]["mean"] if result else None,
        stderr=result["kl"]["stderr"] if result else None,
        baseline=rival["name"] if rival else None,
        baseline_kl=rival["kl"] if rival else None,
        top1_agreement=result["top1_agreement"] if result else None,
        checkpoint_bytes=result["checkpoint_bytes"] if result else None,
        trials=len(record.trials),
        seconds=result["seconds"]["total"] if result else None,
    )


def caveats(records: Sequence[RunRecord]) -> list[str]:
    """Why some of the runs' KL cannot be set against each other; empty if all can."""
    found = []
    finished = [record for record in records if record.result is not None]
    for what, values in (
        ("models differ", {r.identity["signature"].get("model") for r in finished}),
        ("targets differ", {(r.result or {})["activation_mode"] for r in finished}),
        (
            "report tokens differ",
            {(r.result or {})["tokens"]["report"]["digest"] for r in finished},
        ),
    ):
        if len(values) > 1:
            found.append(f"{what}: KL compares only among runs that share them")
    for record, label in zip(records, labels(records), strict=True):
        if record.other_schema:
            files = ", ".join(record.other_schema)
            found.append(f"{label} is of another version of AutoQuant, which wrote {files}")
        elif record.result is None:
            found.append(f"{label} is {record.status}: not confirmed on fresh tokens")
    return found


def budget_notes(records: Sequence[RunRecord]) -> list[str]:
    """For each run whose budget counts other bits than the column BPE: which."""
    named = zip(records, labels(records), strict=True)
    notes = {label: budget_note(r.result) for r, label in named if r.result is not None}
    return [f"{label}: {note}" for label, note in notes.items() if note]


def rival_notes(records: Sequence[RunRecord], rivals: Sequence[Rival]) -> list[str]:
    """For each rival: where its choice differs from the run's own, and by how much its KL."""
    named = dict(zip(map(id, records), labels(records), strict=True))
    return [_rival_note(rival, named[id(rival.run)]) for rival in rivals]


def _rival_note(rival: Rival, label: str) -> str:
    result, best = rival.run.result or {}, rival.run.best
    own = dict(best.groups) if best is not None else {}
    differing = [name for name in own if _format(own[name]) != _format(rival.groups[name])]
    return (
        f"{label}: {rival.name} gives {len(differing)} of {len(own)} groups another format; its KL "
        f"is {rival.kl / result['kl']['mean']:.3f} times this run's"
    )


def _format(choice: str) -> str:
    return choice.partition("/")[0]


def plot_runs(records: Sequence[RunRecord], rivals: Sequence[Rival] = ()) -> "Figure":
    """Confirmed KL against BPE, a colour for each model and a mark for each run.

    The marks of rivals are hollow.
    """
    named = zip(records, labels(records), strict=True)
    finished = {label: record for record, label in named if record.result is not None}
    models = list(dict.fromkeys(r.identity["signature"].get("model") for r in finished.values()))
    figure = new_figure(6.2, 3.6 + 0.1 * (len(finished) + len(rivals)))
    axes = figure.subplots()
    for index, (label, record) in enumerate(finished.items()):
        result = record.result or {}
        model = models.index(record.identity["signature"].get("model"))
        marks = [(label, result["bpe"]["checkpoint"], result["kl"]["mean"], result["kl"]["stderr"])]
        marks += [
            (f"{label}: {rival.name}", rival.bpe, rival.kl, rival.stderr)
            for rival in rivals
            if rival.run is record
        ]
        for shift, (name, bpe, kl, stderr) in enumerate(marks):
            axes.errorbar(
                bpe,
                kl,
                yerr=None if stderr is None else NORMAL_95 * stderr,
                fmt=_MARKERS[(index + shift) % len(_MARKERS)],
                color=LIGHT[_COLORS[model % len(_COLORS)]],
                markerfacecolor="none" if shift else None,
                capsize=3,
                lw=1,
                label=name,
            )
    axes.set_xlabel("bits per element of the checkpoint")
    axes.set_ylabel("KL on fresh tokens, nats per token")
    plain_log(axes, "y")
    figure.legend(loc="outside lower center", ncols=2, handletextpad=0.4)
    return figure


def task_rows(records: Sequence[RunRecord]) -> list[TaskRow]:
    """Tasks of the runs' winners, each held against the first run's on the same items.

    Scores are called by their run's label.
    """
    scores = [
        replace(score, name=label)
        for record, label in zip(records, labels(records), strict=True)
        if record.evaluation is not None
        for score in record.evaluation.scores
        if score.name == WINNER
    ]
    return rows_of_tasks(scores, None)


def render_comparison(records: Sequence[RunRecord], rivals: Sequence[Rival] = ()) -> str:
    """The comparison as HTML text."""
    rows = rows_of(records, rivals)
    picture = ""
    if any(row.kl is not None for row in rows):
        with project_style():
            figure = plot_runs(records, rivals)
            picture = to_svg(figure, "runs", "KL of each run against bits per element")
    return template("compare.html.j2").render(
        rows=rows,
        caveats=caveats(records),
        runs=len(records),
        notes=[*budget_notes(records), *rival_notes(records, rivals)],
        tasks=task_rows(records),
        picture=picture,
        palette=PALETTE,
    )
