"""`autoquant verify`: read an exported checkpoint back."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from autoquant.cli.options import HeadedCommand, format_option, option
from autoquant.cli.output import print_fields, print_json
from autoquant.errors import ConfigError

if TYPE_CHECKING:
    from autoquant.export.verify import Verification


@click.command(
    "verify",
    cls=HeadedCommand,
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
@option(
    "--revision",
    heading="Model",
    metavar="NAME",
    help="Branch, tag or commit of a source on the hub.  [default: its main branch]",
)
@format_option
def command(checkpoint: Path, source: str | None, revision: str | None, format: str) -> None:
    """Read every tensor of an exported checkpoint back and check it."""
    from autoquant.export.verify import require_sound, verify
    from autoquant.source.source import open_source

    if source is None and revision is not None:
        raise ConfigError(
            f"--revision {revision} without --source: a checkpoint has none.",
            fix="name the model with --source, or leave --revision out.",
        )
    original = open_source(source, revision=revision) if source is not None else None
    result = verify(checkpoint, original)
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
    for note in result.notes:
        click.echo(f"note: {note}")
