"""`autoquant join`: a worker on another machine."""

from dataclasses import asdict

import click

from autoquant.cli.configured import ConfiguredCommand
from autoquant.cli.group import Interrupted, typed_command
from autoquant.cli.options import format_option
from autoquant.cli.output import print_json
from autoquant.run.config import JoinConfig


@click.command(
    "join",
    cls=ConfiguredCommand,
    config=JoinConfig,
    examples=[
        (
            "autoquant join MODEL --budget-bpe 5.0 --trials-at-once 4 "
            "--study-storage postgresql://me@host/studies",
            "Measure trials of the search that another machine runs with the same settings:",
        ),
    ],
)
@format_option
def command(config: JoinConfig, format: str) -> None:
    """Measure trials of a search that is in progress on another machine.

    Takes the settings of the search. Its own are the names of places (MODEL, --calibration), the
    device and memory, and --out: a folder that keeps moments of inputs and codes for another time.
    """
    from autoquant.cli.terminal import Terminal
    from autoquant.run.machines.joining import join_search

    try:
        with Terminal() as terminal:
            joined = join_search(config, terminal)
    except KeyboardInterrupt:
        raise Interrupted(typed_command()) from None
    if format == "json":
        print_json(asdict(joined))
    else:
        click.echo(f"{joined.search} has ended; {joined.trials} of its trials were measured here.")
