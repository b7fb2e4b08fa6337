"""`autoquant report`: a run as one HTML page."""

from pathlib import Path

import click

from autoquant.cli.options import HeadedCommand, format_option, option, out_option
from autoquant.cli.output import print_fields, print_json


@click.command(
    "report",
    cls=HeadedCommand,
    examples=[
        ("autoquant report runs/demo", "Write runs/demo/report.html, also of an unfinished run:"),
        ("autoquant report runs/demo --png pictures", "Each picture as a PNG, for a model card:"),
    ],
)
@click.argument("run", type=click.Path(path_type=Path))
@out_option("FILE", "HTML file to write.  [default: report.html in the run directory]")
@option(
    "--png",
    heading="Output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for each picture as a PNG.",
)
@format_option
def command(run: Path, out: Path | None, png: Path | None, format: str) -> None:
    """Write the report of a run directory, finished or not."""
    from autoquant.report.html import write_pngs, write_report
    from autoquant.report.record import RunRecord
    from autoquant.report.words import verdict

    record = RunRecord.read(run)
    report = write_report(record, out)
    pictures = write_pngs(record, png) if png is not None else []
    if format == "json":
        print_json(
            {
                "run": str(run),
                "status": str(record.status),
                "verdict": verdict(record),
                "missing": list(record.missing),
                "report": str(report),
                "pictures": [str(path) for path in pictures],
            }
        )
        return
    click.echo(verdict(record))
    click.echo()
    fields: dict[str, object] = {"report": report}
    if record.missing:
        fields["missing"] = "; ".join(record.missing)
    if pictures:
        fields["pictures"] = ", ".join(str(path) for path in pictures)
    print_fields(fields)
