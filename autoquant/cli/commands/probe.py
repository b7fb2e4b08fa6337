"""`autoquant probe`: what each layer group costs in each format, without a search."""

import shlex
from pathlib import Path
from typing import Any

import click

from autoquant.cli.configured import ConfiguredCommand
from autoquant.cli.group import Interrupted, typed_command
from autoquant.cli.options import format_option
from autoquant.cli.output import print_fields, print_json, print_table
from autoquant.cli.ranks import one_voice
from autoquant.measure.method import ProbeMethod
from autoquant.run.config import ProbeConfig


@click.command(
    "probe",
    cls=ConfiguredCommand,
    config=ProbeConfig,
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
@format_option
def command(config: ProbeConfig, format: str) -> None:
    """Measure the KL of each layer group in each format, for later searches.

    A search without --sensitivity finds the probes in runs/ by itself.
    """
    from autoquant.cli.terminal import Terminal
    from autoquant.measure.ranks.group import is_follower
    from autoquant.run.budgets import run_probes

    try:
        with one_voice(), Terminal() as terminal:
            outcome = run_probes(config, terminal)
    except KeyboardInterrupt:
        raise Interrupted(typed_command()) from None
    if is_follower():
        return
    if format == "json":
        print_json(outcome.result | {"run": str(outcome.path)})
    else:
        _print(outcome.result, outcome.path, config.probe)


def _print(result: dict[str, Any], run: Path, wanted: ProbeMethod) -> None:
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
    method = "" if wanted is ProbeMethod.SCREENED else f" --probe {wanted}"
    click.echo(
        f"next:   the same options with `autoquant search{method} --budget-bpe BITS "
        f"--sensitivity {shlex.quote(str(run))}`"
    )
