"""`autoquant search`: the main job."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from autoquant.cli.group import Interrupted
from autoquant.cli.options import (
    GroupedCommand,
    budget_options,
    config_option,
    device_options,
    format_option,
    model_argument,
    option,
    resolved_settings,
    token_options,
    tracking_options,
)
from autoquant.cli.output import print_json


@click.command(
    "search",
    cls=GroupedCommand,
    examples=[
        ("autoquant search --budget-bpe 5.0", "The bundled reference model:"),
        (
            "autoquant search ./my-model --budget-bpe 5.0 --calibration ./texts",
            "Your model on your text:",
        ),
        (
            "autoquant search ./my-moe --budget-bpe 4.75 --space experts-only --trials 100",
            "Only the routed experts, with more trials:",
        ),
    ],
)
@model_argument(required=False)
@budget_options(required=True)
@option(
    "--space",
    heading="Search",
    default="default",
    metavar="NAME|FILE",
    help="Which layers may take which formats: a shipped space, or a YAML file.",
)
@option(
    "--activation-mode",
    heading="Search",
    type=click.Choice(["w4a4", "w4a16"]),
    default="w4a4",
    help="Whether NVFP4 layers see NVFP4 inputs (Blackwell) or BF16 inputs (Hopper).",
)
@option(
    "--trials",
    heading="Search",
    type=click.IntRange(min=0),
    default=60,
    help="Joint measurements beyond the baselines and the solver's optimum.",
)
@option(
    "--max-seconds",
    heading="Search",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    metavar="S",
    help="Begin no further trial after this time.",
)
@option(
    "--max-tokens",
    heading="Search",
    type=click.IntRange(min=1),
    default=None,
    metavar="N",
    help="Begin no further trial once all trials together have seen N tokens.",
)
@option("--seed", heading="Search", type=int, default=0, help="Same seed, same result.")
@token_options()
@device_options()
@tracking_options()
@option(
    "--out",
    heading="Output",
    setting=False,
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    metavar="DIR",
    help="Run directory; the same search goes on in it.  [default: runs/NAME]",
)
@option(
    "--resume/--fresh",
    heading="Output",
    setting=False,
    default=True,
    help="Go on with an earlier run of the same search, or set it aside and begin anew.",
)
@option(
    "--export/--no-export",
    heading="Output",
    setting=False,
    default=True,
    help="Write the winner as a checkpoint.",
)
@format_option
@config_option
@click.pass_context
def command(ctx: click.Context, /, **settings: Any) -> None:
    """Search formats for every layer under a budget, and export the winner.

    Without MODEL, on the reference model that comes with AutoQuant.
    """
    from autoquant.cli.search_output import print_result
    from autoquant.cli.terminal import Terminal
    from autoquant.search.run import run_search
    from autoquant.search.settings import make_config

    try:
        with Terminal() as terminal:
            outcome = run_search(
                make_config(settings),
                out=settings["out"],
                resume=settings["resume"],
                settings=resolved_settings(ctx),
                command=_command_line(),
                track_in_mlflow=settings["mlflow"],
                experiment=settings["mlflow_experiment"],
                child_runs=settings["mlflow_trials"],
                observer=terminal,
            )
    except KeyboardInterrupt:
        raise Interrupted(_command_line()) from None
    if settings["format"] == "json":
        print_json(outcome.result | {"run": str(outcome.path)})
    else:
        print_result(outcome.result, outcome.path)


def _command_line() -> str:
    """The command line as the user typed it; `--fresh` would not go on, so it is left out."""
    return shlex.join(["autoquant", *(a for a in sys.argv[1:] if a != "--fresh")])
