"""`autoquant score`: the KL of an assignment or of an exported checkpoint."""

from pathlib import Path
from typing import Any

import click

from autoquant.cli.options import (
    GroupedCommand,
    activation_mode_option,
    assignment_option,
    config_option,
    device_options,
    format_option,
    kv_cache_option,
    model_argument,
    option,
    revision_option,
    token_options,
)
from autoquant.cli.output import figure, print_fields, print_json
from autoquant.errors import ConfigError


@click.command(
    "score",
    cls=GroupedCommand,
    examples=[
        (
            "autoquant score --checkpoint runs/demo/checkpoint",
            "An exported checkpoint against the bundled model:",
        ),
        (
            "autoquant score ./my-model --assignment runs/mine/assignment.yaml --split search",
            "An assignment, on the tokens that the search measured:",
        ),
    ],
)
@model_argument(required=False)
@revision_option
@assignment_option(required=False)
@option(
    "--checkpoint",
    heading="Model",
    setting=False,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Exported checkpoint to measure against MODEL.",
)
@activation_mode_option
@kv_cache_option
@option(
    "--split",
    heading="Data",
    type=click.Choice(["search", "report"]),
    default="report",
    help="Tokens to measure on.",
)
@token_options()
@device_options()
@format_option
@config_option
def command(**settings: Any) -> None:
    """Measure KL, agreement and perplexity against the BF16 model.

    With the options of a search, on exactly its tokens.
    """
    from autoquant.cli.terminal import Terminal
    from autoquant.model.inputs import ActivationMode
    from autoquant.plan.assignment import Assignment
    from autoquant.plan.kv_cache import KvCache
    from autoquant.run.settings import token_plan
    from autoquant.run.single import score
    from autoquant.source.source import REFERENCE_MODEL, open_source

    file, checkpoint = settings["assignment"], settings["checkpoint"]
    if (file is None) == (checkpoint is None):
        given = (
            "neither --assignment nor --checkpoint is"
            if file is None
            else "both --assignment and --checkpoint are"
        )
        raise ConfigError(
            f"{given} given: `score` measures one of them.",
            fix="give either --assignment FILE or --checkpoint DIR.",
        )
    with Terminal() as terminal:
        result = score(
            open_source(settings["model"] or REFERENCE_MODEL, revision=settings["revision"]),
            assignment=Assignment.read(file) if file is not None else None,
            checkpoint=checkpoint,
            split=settings["split"],
            calibration=settings["calibration"],
            tokens=token_plan(settings),
            mode=ActivationMode(settings["activation_mode"]),
            kv_cache=KvCache(settings["kv_cache"]),
            device=settings["device"],
            trust_remote_code=settings["trust_remote_code"],
            observer=terminal,
        )
    if settings["format"] == "json":
        print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    kl = result["kl"]
    print_fields(
        {
            "BPE": f"{result['bpe']:.4f} of the checkpoint",
            "groups": ", ".join(f"{n} {name}" for name, n in result["counts"].items() if n),
            "KL": f"{kl['mean']:.6f} +- {figure(kl['stderr'], '.6f')} nats per token "
            f"({result['activation_mode']}, keys and values in {result['kv_cache'].upper()})",
            "median": f"{kl['median']:.6f}",
            "p99, p99.9, max": f"{kl['p99']:.4f}, {kl['p999']:.4f}, {kl['max']:.4f}",
            "top-1": f"{result['top1_agreement']:.2%} agree",
            "perplexity": f"{result['perplexity']['bf16']:.3f} in BF16, "
            f"{result['perplexity']['quantized']:.3f} quantized",
            "tokens": f"{result['split']['tokens']:,} ({result['split']['name']} split, "
            f"digest {result['split']['digest']})",
        }
    )
