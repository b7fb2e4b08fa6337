"""`autoquant verify`: read an exported checkpoint back."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from autoquant.cli.options import HeadedCommand, format_option, option
from autoquant.cli.output import print_fields, print_json
from autoquant.errors import ConfigError

if TYPE_CHECKING:
    from autoquant.export.verify import Verification
    from autoquant.independent.forward import Agreement
    from autoquant.source.source import Source


@click.command(
    "verify",
    cls=HeadedCommand,
    examples=[
        ("autoquant verify run/checkpoint", "Names, shapes, scales, declarations, sizes:"),
        ("autoquant verify run/checkpoint --source ./my-model", "Every code and byte as well:"),
        (
            "autoquant verify run/checkpoint --source ./my-model --forward",
            "And what transformers' own model computes with them:",
        ),
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
@option(
    "--forward",
    heading="Model",
    is_flag=True,
    help="Run both by transformers' own model, and hold the KL against what was measured.",
)
@format_option
def command(
    checkpoint: Path, source: str | None, revision: str | None, forward: bool, format: str
) -> None:
    """Read every tensor of an exported checkpoint back and check it."""
    from autoquant.export.verify import require_sound, verify
    from autoquant.source.source import open_source

    if source is None and revision is not None:
        raise ConfigError(
            f"--revision {revision} without --source: a checkpoint has none.",
            fix="name the model with --source, or leave --revision out.",
        )
    if source is None and forward:
        raise ConfigError(
            "--forward without --source: the KL of a checkpoint is to its model.",
            fix="name the model with --source, or leave --forward out.",
        )
    original = open_source(source, revision=revision) if source is not None else None
    result = verify(checkpoint, original)
    found = None
    if forward and original is not None and result.ok:
        found = _forward(checkpoint, original)
    if format == "json":
        print_json(result.to_dict() | {"forward": found.to_dict() if found is not None else None})
    else:
        _print(result)
    require_sound(result)
    if found is not None:
        from autoquant.run.independent import require_agreement

        if format != "json":
            print_fields(
                {"KL, independent": f"{found.kl:.6g} nats per token on {found.tokens} tokens"}
                | {"KL, as measured": f"{found.said:.6g}, {found.allowed:.2g} apart is noise"}
            )
            if found.note is not None:
                click.echo(f"note: {found.note}")
        require_agreement(checkpoint, found)


def _forward(checkpoint: Path, source: "Source") -> "Agreement":
    """The checkpoint and its model, run on the tokens of its own measurement."""
    from autoquant.errors import SourceError
    from autoquant.export.companions import AUTOQUANT_FILE
    from autoquant.independent.forward import Evidence
    from autoquant.model.loading import choose_device
    from autoquant.run.independent import check_by_forward
    from autoquant.source.json_file import read_json_object

    file = checkpoint / AUTOQUANT_FILE
    said = read_json_object(file).get("forward") if file.exists() else None
    if not isinstance(said, dict):
        raise SourceError(
            f"{checkpoint} holds no measurement to hold a forward against.",
            fix="export it again without --calibrated, or leave --forward out.",
        )
    return check_by_forward(checkpoint, source, Evidence.of(said), choose_device(None))


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
