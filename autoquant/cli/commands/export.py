"""`autoquant export`: an assignment as a checkpoint that engines load."""

from typing import Any

import click

from autoquant.cli.configured import ConfiguredCommand
from autoquant.cli.options import format_option
from autoquant.cli.output import print_fields, print_json
from autoquant.run.config import ExportConfig


@click.command(
    "export",
    cls=ConfiguredCommand,
    config=ExportConfig,
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
@format_option
def command(config: ExportConfig, format: str) -> None:
    """Calibrate input scales, quantize, and write a checkpoint that engines load."""
    from autoquant.cli.terminal import Terminal
    from autoquant.run.single import export_single

    with Terminal() as terminal:
        result = export_single(config, terminal)
    fields: dict[str, Any] = {}
    if config.modelopt_recipe is not None:
        fields["recipe"] = str(config.modelopt_recipe)
    if result is not None:
        fields |= {
            "checkpoint": str(result.path),
            "bpe": result.bpe,
            "checkpoint_bytes": result.checkpoint_bytes,
        }
    if format == "json":
        print_json(fields)
    elif result is None:
        print_fields(fields)
    else:
        print_fields(fields | {"next": f"autoquant verify {result.path}"})
