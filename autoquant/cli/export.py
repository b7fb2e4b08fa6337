"""`autoquant export`: an assignment as a checkpoint that engines load."""

from pathlib import Path
from typing import Any

import click

from autoquant.cli.options import (
    GroupedCommand,
    assignment_option,
    config_option,
    device_options,
    format_option,
    kv_cache_option,
    layout_option,
    model_argument,
    option,
    out_option,
    token_options,
)
from autoquant.cli.output import print_fields, print_json


@click.command(
    "export",
    cls=GroupedCommand,
    examples=[
        (
            "autoquant export --assignment runs/demo/assignment.yaml --out demo-nvfp4",
            "The bundled model under an assignment:",
        ),
        (
            "autoquant export BIG-MODEL --assignment runs/big/assignment.yaml "
            "--calibrated runs/big/calibration.json --out big-nvfp4",
            "With the input ranges of a search, in the memory of one tensor:",
        ),
    ],
)
@model_argument(required=False)
@assignment_option(required=True)
@option(
    "--calibrated",
    heading="Data",
    setting=False,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    metavar="FILE",
    help="calibration.json of a search: its input ranges are taken, no text is read and the model "
    "is not loaded.",
)
@kv_cache_option
@token_options()
@device_options()
@out_option("DIR", "New folder for the checkpoint.", required=True)
@layout_option
@format_option
@config_option
def command(**settings: Any) -> None:
    """Calibrate input scales, quantize, and write a checkpoint that engines load."""
    from autoquant.assignment import Assignment
    from autoquant.checkpoint.layout import Layout
    from autoquant.checkpoint.source import REFERENCE_MODEL, open_source
    from autoquant.cli.terminal import Terminal
    from autoquant.kv_cache import KvCache
    from autoquant.search.settings import token_plan
    from autoquant.search.single import export_assignment

    with Terminal() as terminal:
        result = export_assignment(
            open_source(settings["model"] or REFERENCE_MODEL),
            Assignment.read(settings["assignment"]),
            settings["out"],
            layout=Layout(settings["layout"]),
            kv_cache=KvCache(settings["kv_cache"]),
            calibration=settings["calibration"],
            tokens=token_plan(settings),
            device=settings["device"],
            trust_remote_code=settings["trust_remote_code"],
            calibrated=settings["calibrated"],
            observer=terminal,
        )
    fields = {
        "checkpoint": str(result.path),
        "bpe": result.bpe,
        "checkpoint_bytes": result.checkpoint_bytes,
    }
    if settings["format"] == "json":
        print_json(fields)
    else:
        print_fields(fields | {"next": f"autoquant verify {settings['out']}"})
