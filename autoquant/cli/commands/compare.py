"""`autoquant compare`: runs side by side."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from autoquant.cli.options import HeadedCommand, format_option, out_option
from autoquant.cli.output import print_json, print_table, warn

if TYPE_CHECKING:
    from autoquant.report.compare import RunRow


@click.command(
    "compare",
    cls=HeadedCommand,
    examples=[
        ("autoquant compare runs/a runs/b", "A table of budgets, seeds or models:"),
        ("autoquant compare runs/a runs/b --out compared.html", "And a page with a picture:"),
    ],
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@out_option("FILE", "HTML file to write as well.")
@format_option
def command(runs: tuple[Path, ...], out: Path | None, format: str) -> None:
    """Put several run directories side by side on one page."""
    from dataclasses import asdict

    from autoquant.files import write_atomic
    from autoquant.report.compare import caveats, render_comparison, rows_of
    from autoquant.report.html import writing
    from autoquant.report.record import RunRecord

    records = [RunRecord.read(path) for path in runs]
    rows = rows_of(records)
    notes = caveats(records)
    if out is not None:
        page = render_comparison(records)
        with writing(out):
            write_atomic(out, page)
    if format == "json":
        listed = {"runs": [asdict(row) for row in rows], "caveats": notes}
        print_json(listed | ({"report": str(out)} if out is not None else {}))
        return
    _print(rows)
    if out is not None:
        click.echo(f"\nreport  {out}")
    for note in notes:
        warn(f"{note}.")


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
