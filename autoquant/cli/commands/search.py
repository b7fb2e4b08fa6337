"""`autoquant search`: the main job."""

from pathlib import Path
from typing import Any

import click

from autoquant.cli.group import Interrupted, typed_command
from autoquant.cli.options import (
    GroupedCommand,
    activation_mode_option,
    budget_options,
    config_option,
    device_options,
    format_option,
    kv_cache_option,
    layout_option,
    model_argument,
    option,
    out_option,
    probe_option,
    resolved_settings,
    revision_option,
    space_option,
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
        ("autoquant search --budget-bpe 4.8,5,5.5,6 --out runs/budgets", "Several budgets:"),
        (
            "autoquant search ./my-moe --budget-bpe 4.75 --space experts-only --trials 100",
            "Only the routed experts, with more trials:",
        ),
    ],
)
@model_argument(required=False)
@revision_option
@budget_options(required=True, several=True)
@option(
    "--cost",
    heading="Budget",
    type=click.Choice(["bits", "active-bytes"]),
    default="bits",
    help="What the budget limits: stored bits, or what one token reads (top-k of the experts).",
)
@space_option
@activation_mode_option
@kv_cache_option
@probe_option
@option(
    "--sensitivity",
    heading="Search",
    setting=False,
    type=click.Path(path_type=Path),
    default=None,
    metavar="RUN",
    help="Run directory whose probes to take over, of `autoquant probe` or of another search with "
    "the same settings.  [default: what `autoquant probe` wrote to runs/]",
)
@option(
    "--trials",
    heading="Search",
    type=click.IntRange(min=0),
    default=30,
    metavar="N",
    help="Joint measurements beyond the baselines, the solver's optima and the check of their "
    "scale rules.",
)
@option(
    "--reweight-trials",
    heading="Search",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="How many of the trials, at most all, Optuna proposes, over weights of the sensitivities "
    "by role and depth; the others come from predictions and swaps.",
)
@option(
    "--max-seconds",
    heading="Search",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    metavar="S",
    help="Begin no further trial once loading, calibration, probes and trials have taken S "
    "seconds, those of an interrupted call included. A finished result stays: --fresh begins anew.",
)
@option(
    "--max-tokens",
    heading="Search",
    type=click.IntRange(min=1),
    default=None,
    metavar="N",
    help="Begin no further trial once all trials together have seen N tokens. A finished result "
    "stays: --fresh begins anew.",
)
@token_options()
@device_options()
@tracking_options()
@out_option("DIR", "Run directory; the same search goes on in it.  [default: runs/NAME]")
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
    default=None,
    help="Write the winner as a checkpoint.  [default: for a single budget]",
)
@layout_option
@format_option
@config_option
@click.pass_context
def command(ctx: click.Context, /, **settings: Any) -> None:
    """Search formats for every layer under a budget, and export the winner.

    Without MODEL, on the reference model that comes with AutoQuant.
    """
    from autoquant.cli.commands.search_output import print_frontier, print_result
    from autoquant.cli.terminal import Terminal
    from autoquant.run.budgets import Tracking, run_searches
    from autoquant.run.settings import make_configs

    try:
        with Terminal() as terminal:
            outcomes = run_searches(
                make_configs(settings),
                out=settings["out"],
                resume=settings["resume"],
                settings=resolved_settings(ctx),
                command=typed_command(),
                tracking=Tracking.of(settings),
                observer=terminal,
                sensitivity=settings["sensitivity"],
            )
    except KeyboardInterrupt:
        raise Interrupted(typed_command()) from None
    if settings["format"] == "json":
        found = [outcome.result | {"run": str(outcome.path)} for outcome in outcomes]
        print_json(found[0] if len(found) == 1 else {"runs": found})
    elif len(outcomes) == 1:
        print_result(outcomes[0].result, outcomes[0].path)
    else:
        print_frontier([(outcome.result, outcome.path) for outcome in outcomes])
