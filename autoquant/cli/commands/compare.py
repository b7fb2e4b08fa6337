"""`autoquant compare`: runs side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoquant.cli.options import HeadedCommand, format_option, option, out_option
from autoquant.cli.output import print_json, print_table, warn

if TYPE_CHECKING:
    from autoquant.evaluate.scores import TaskRow
    from autoquant.report.compare import Rival, RunRow
    from autoquant.report.record import RunRecord


@click.command(
    "compare",
    cls=HeadedCommand,
    examples=[
        ("autoquant compare runs/a runs/b", "A table of budgets, seeds or models:"),
        ("autoquant compare runs/a runs/b --out compared.html", "And a page with a picture:"),
        ("autoquant compare runs/a --with modelopt", "Beside what ModelOpt's search picks:"),
    ],
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@option(
    "--with",
    "peer",
    heading="Output",
    type=click.Choice(["modelopt"]),
    help="Run this program's own search on each run's model, tokens and formats, and set its "
    "choice beside the run's; what it picks is kept in the run directory.",
)
@out_option("FILE", "HTML file to write as well.")
@format_option
def command(runs: tuple[Path, ...], peer: str | None, out: Path | None, format: str) -> None:
    """Put several run directories side by side on one page."""
    from dataclasses import asdict

    from autoquant.files import write_atomic
    from autoquant.report.compare import (
        caveats,
        render_comparison,
        rival_notes,
        rows_of,
        task_rows,
    )
    from autoquant.report.html import writing
    from autoquant.report.record import RunRecord

    records = [RunRecord.read(path) for path in runs]
    rivals = _rivals(records) if peer is not None else ()
    rows, tasks = rows_of(records, rivals), task_rows(records)
    notes = caveats(records)
    if out is not None:
        page = render_comparison(records, rivals)
        with writing(out):
            write_atomic(out, page)
    if format == "json":
        listed = {"runs": [asdict(row) for row in rows], "caveats": notes}
        if tasks:
            listed["tasks"] = [{"run": row.score.name, **row.to_dict("first")} for row in tasks]
        if peer is not None:
            listed["rivals"] = [_listed(rival) for rival in rivals]
        print_json(listed | ({"report": str(out)} if out is not None else {}))
        return
    _print(rows)
    if tasks:
        click.echo()
        _print_tasks(tasks)
    for note in rival_notes(records, rivals):
        click.echo(f"{note}.")
    if out is not None:
        click.echo(f"\nreport  {out}")
    for note in notes:
        warn(f"{note}.")


def _rivals(records: "list[RunRecord]") -> "tuple[Rival, ...]":
    from autoquant.cli.terminal import Terminal
    from autoquant.modelopt.comparing import rivals_of

    with Terminal() as terminal:
        return tuple(rival for record in records for rival in rivals_of(record, terminal))


def _listed(rival: "Rival") -> dict[str, Any]:
    """A rival as JSON types."""
    return {
        "run": str(rival.run.path),
        "method": rival.method,
        "bpe": rival.bpe,
        "kl": rival.kl,
        "groups": dict(rival.groups),
    }


def _print_tasks(rows: "list[TaskRow]") -> None:
    from autoquant.report.words import task_cells

    header = (
        *("task", "figure", "run", "value", "+-", "to the first"),
        *("95 % interval", "items"),
    )
    print_table(
        header,
        [
            (row.score.task, row.metric.name, row.score.name, *task_cells(row), row.score.items)
            for row in rows
        ],
    )


def _print(rows: "list[RunRow]") -> None:
    from autoquant.report.words import duration, exact, fixed, number, percent, size

    header = (
        *("run", "model", "budget", "mode", "seed", "BPE", "KL", "+-"),
        *("best recipe in budget", "its KL", "top-1", "size", "trials", "time"),
    )
    print_table(
        header,
        [
            (
                row.run if row.status == "finished" else f"{row.run} ({row.status})",
                Path(row.model).name,
                exact(row.budget_bpe),
                row.activation_mode or "-",
                "-" if row.seed is None else row.seed,
                fixed(row.bpe, 3),
                fixed(row.kl, 5),
                number(row.stderr, 2),
                row.baseline or "-",
                fixed(row.baseline_kl, 5),
                percent(row.top1_agreement),
                "-" if row.checkpoint_bytes is None else size(row.checkpoint_bytes),
                row.trials,
                "-" if row.seconds is None else duration(row.seconds),
            )
            for row in rows
        ],
    )
