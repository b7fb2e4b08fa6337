"""`autoquant export`: an assignment as a checkpoint that engines load."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    revision_option,
    token_options,
)
from autoquant.cli.output import print_fields, print_json
from autoquant.errors import ConfigError

if TYPE_CHECKING:
    from autoquant.plan.assignment import Assignment
    from autoquant.source.source import Source


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
        (
            "autoquant export --assignment runs/demo/assignment.yaml --modelopt-recipe demo.yaml",
            "The formats alone, for quantization-aware training with ModelOpt:",
        ),
    ],
)
@model_argument(required=False)
@revision_option
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
@out_option("DIR", "New folder for the checkpoint.")
@option(
    "--modelopt-recipe",
    heading="Output",
    setting=False,
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    metavar="FILE",
    help="YAML file for a recipe of NVIDIA ModelOpt with the same formats, to train from; without "
    "--out it is all that is written.",
)
@layout_option
@format_option
@config_option
def command(**settings: Any) -> None:
    """Calibrate input scales, quantize, and write a checkpoint that engines load."""
    from autoquant.plan.assignment import Assignment
    from autoquant.plan.kv_cache import KvCache
    from autoquant.run.single import write_recipe
    from autoquant.source.source import REFERENCE_MODEL, open_source

    out, recipe = settings["out"], settings["modelopt_recipe"]
    if out is None and recipe is None:
        raise ConfigError(
            "neither --out nor --modelopt-recipe: `export` has nothing to write.",
            fix="give --out DIR for a checkpoint, --modelopt-recipe FILE for its formats.",
        )
    source = open_source(
        settings["model"] or REFERENCE_MODEL,
        revision=settings["revision"],
        weights=out is not None,
    )
    assignment = Assignment.read(settings["assignment"])
    fields: dict[str, Any] = {}
    if recipe is not None:
        write_recipe(source, assignment, KvCache(settings["kv_cache"]), recipe)
        fields["recipe"] = str(recipe)
    if out is not None:
        fields |= _export(source, assignment, settings)
    if settings["format"] == "json":
        print_json(fields)
    elif out is None:
        print_fields(fields)
    else:
        print_fields(fields | {"next": f"autoquant verify {out}"})


def _export(source: "Source", assignment: "Assignment", settings: dict[str, Any]) -> dict[str, Any]:
    from autoquant.cli.terminal import Terminal
    from autoquant.export.layouts.base import Layout
    from autoquant.plan.kv_cache import KvCache
    from autoquant.run.settings import token_plan
    from autoquant.run.single import export_assignment

    with Terminal() as terminal:
        result = export_assignment(
            source,
            assignment,
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
    return {
        "checkpoint": str(result.path),
        "bpe": result.bpe,
        "checkpoint_bytes": result.checkpoint_bytes,
    }
