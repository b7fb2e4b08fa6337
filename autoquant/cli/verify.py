"""`autoquant verify`: read an exported checkpoint back."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from autoquant.cli.options import GroupedCommand, format_option, option
from autoquant.cli.output import print_fields, print_json

if TYPE_CHECKING:
    from autoquant.checkpoint.verify import Verification


@click.command(
    "verify",
    cls=GroupedCommand,
    examples=[
        ("autoquant verify run/checkpoint", "Names, shapes, scales, declarations, sizes:"),
        ("autoquant verify run/checkpoint --source Qwen/Qwen3-8B", "Every code and byte as well:"),
    ],
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@option(
    "--source",
    heading="Model",
    metavar="MODEL",
    help="The model that the checkpoint was made from: a folder or a hub id.",
)
@format_option
def command(checkpoint: Path, source: str | None, format: str) -> None:
    """Read every tensor of an exported checkpoint back."""
    from autoquant.checkpoint.source import open_source
    from autoquant.checkpoint.verify import require_sound, verify

    result = verify(checkpoint, open_source(source) if source is not None else None)
    if format == "json":
        print_json(result.to_dict())
    else:
        _print(result)
    require_sound(result)


def _print(result: "Verification") -> None:
    fields: dict[str, object] = {
        "checkpoint": result.path,
        "layout": f"{result.layout}, keys and values in {result.kv_cache.upper()}",
        "tensors": f"{result.tensors:,}",
        "linears": ", ".join(f"{n} {format.upper()}" for format, n in result.linears.items()),
        "stored": f"{result.checkpoint_bytes:,} bytes, {result.bpe:.4f} bits per element",
    }
    for format, error in result.relative_error.items():
        fields[f"{format.upper()} error"] = f"at most {error:.4f} of a weight's norm"
    fields["problems"] = len(result.problems) or "none"
    print_fields(fields)
    for problem in result.problems:
        click.echo(f"- {problem}")
