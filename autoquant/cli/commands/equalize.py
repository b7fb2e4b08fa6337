"""`autoquant equalize`: a copy of a model that loses less with 4-bit inputs."""

import shlex
from dataclasses import asdict

import click

from autoquant.cli.configured import ConfiguredCommand
from autoquant.cli.options import format_option
from autoquant.cli.output import print_fields, print_json
from autoquant.equalize.config import EqualizeConfig


@click.command(
    "equalize",
    cls=ConfiguredCommand,
    config=EqualizeConfig,
    examples=[
        (
            "autoquant equalize ./my-model --calibration text.jsonl --out my-model-equalized",
            "A copy, which is then searched in place of the model:",
        ),
    ],
)
@format_option
def command(config: EqualizeConfig, format: str) -> None:
    """Scale channels between products by powers of two, so that inputs lose less in 4 bits.

    The copy computes the same as the model, bit by bit, which is checked; it has the same size.
    """
    from autoquant.cli.terminal import Terminal
    from autoquant.equalize.equalize import equalize

    with Terminal() as terminal:
        result = equalize(config, terminal)
    if format == "json":
        print_json(asdict(result) | {"path": str(result.path)})
        return
    print_fields(
        {
            "copy": str(result.path),
            "channels": f"{result.scaled:,} of {result.channels:,} have another size, behind "
            f"{result.sites:,} norms and up projections",
            "checked": "the same final hidden states, bit by bit",
            "next": _next(config),
        }
    )


def _next(config: EqualizeConfig) -> str:
    """The search of the copy, on the same text."""
    words = ["autoquant", "search", str(config.out), "--budget-bpe", "5.0"]
    if config.calibration is not None:
        words += ["--calibration", config.calibration]
    return shlex.join(words)
