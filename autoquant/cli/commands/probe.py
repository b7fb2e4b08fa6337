"""`autoquant probe`: what each layer group costs in each format, without a search."""

import shlex
from pathlib import Path
from typing import Any

import click

from autoquant.cli.group import Interrupted, typed_command
from autoquant.cli.options import (
    GroupedCommand,
    activation_mode_option,
    config_option,
    device_options,
    format_option,
    kv_cache_option,
    model_argument,
    option,
    out_option,
    probe_option,
    resolved_settings,
    revision_option,
    space_option,
    token_options,
)
from autoquant.cli.output import print_fields, print_json, print_table


@click.command(
    "probe",
    cls=GroupedCommand,
    examples=[
        ("autoquant probe", "The bundled reference model:"),
        ("autoquant probe ./my-model --probe gradient", "A first look at a large model:"),
        ("autoquant probe ./my-model --calibration ./texts --out runs/probes", "On your text:"),
        (
            "autoquant search ./my-model --calibration ./texts --sensitivity runs/probes "
            "--budget-bpe 4.75,5,5.5",
            "Then search with these probes:",
        ),
    ],
)
@model_argument(required=False)
@revision_option
@space_option
@activation_mode_option
@kv_cache_option
@probe_option
@token_options(report=False)
@device_options()
@out_option("DIR", "Run directory; the same probes go on in it.  [default: runs/NAME]")
@option(
    "--resume/--fresh",
    heading="Output",
    setting=False,
    default=True,
    help="Go on with earlier probes of the same settings, or set them aside and begin anew.",
)
@format_option
@config_option
@click.pass_context
def command(ctx: click.Context, /, **settings: Any) -> None:
    """Measure what each layer costs in each format; a search picks it up.

    A search without --sensitivity finds what is in runs/ by itself.
    """
    from autoquant.cli.terminal import Terminal
    from autoquant.run.budgets import run_probes
    from autoquant.run.settings import make_config

    try:
        with Terminal() as terminal:
            outcome = run_probes(
                make_config(_as_of_search(settings)),
                out=settings["out"],
                resume=settings["resume"],
                settings=resolved_settings(ctx),
                command=typed_command(),
                observer=terminal,
            )
    except KeyboardInterrupt:
        raise Interrupted(typed_command()) from None
    if settings["format"] == "json":
        print_json(outcome.result | {"run": str(outcome.path)})
    else:
        _print(outcome.result, outcome.path, settings["probe"])


def _as_of_search(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a search with these probes; on the others probes do not depend."""
    from autoquant.cli.commands.search import command as search

    defaults = search.make_context("search", ["--budget-bpe=16"]).params
    return {**defaults, **settings, "budget_bpe": 16.0, "report_tokens": 1}


def _print(result: dict[str, Any], run: Path, wanted: str) -> None:
    """Print a row for each group and a column for each choice."""
    rows: dict[str, dict[str, float]] = {}
    for probe in result["probes"]:
        rows.setdefault(probe["group"], {})[probe["choice"]] = probe["kl"]
    choices = list(dict.fromkeys(probe["choice"] for probe in result["probes"]))
    print_fields(
        {
            "probes": f"{len(result['probes'])} on {len(rows)} layer groups ({result['method']})",
            "KL": "nats per token, one group in one choice and all else in BF16",
            "run": run,
        }
    )
    click.echo()
    print_table(
        ["group", *choices],
        [
            [group, *(f"{own[c]:.3g}" if c in own else "-" for c in choices)]
            for group, own in rows.items()
        ],
    )
    click.echo()
    method = "" if wanted == "screened" else f" --probe {wanted}"
    click.echo(
        f"next:   the same options with `autoquant search{method} --budget-bpe BITS "
        f"--sensitivity {shlex.quote(str(run))}`"
    )
