"""`autoquant score`: the KL of an assignment or of an exported checkpoint."""

from typing import Any

import click

from autoquant.cli.configured import ConfiguredCommand
from autoquant.cli.options import format_option
from autoquant.cli.output import figure, print_fields, print_json, print_table
from autoquant.run.config import ScoreConfig


@click.command(
    "score",
    cls=ConfiguredCommand,
    config=ScoreConfig,
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
@format_option
def command(config: ScoreConfig, format: str) -> None:
    """Measure KL, agreement and perplexity against the BF16 model.

    With the options of a search, it uses exactly the tokens of that search.
    """
    from autoquant.cli.terminal import Terminal
    from autoquant.run.single import score

    with Terminal() as terminal:
        result = score(config, terminal)
    if format == "json":
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
            f"({result['target']}, keys and values in {result['kv_cache'].upper()})",
            "median": f"{kl['median']:.6f}",
            "p99, p99.9, max": f"{kl['p99']:.4f}, {kl['p999']:.4f}, {kl['max']:.4f}",
            "top-1": f"{result['top1_agreement']:.2%} agree",
            "perplexity": f"{result['perplexity']['bf16']:.3f} in BF16, "
            f"{result['perplexity']['quantized']:.3f} quantized",
            "tokens": f"{result['split']['tokens']:,} ({result['split']['name']} split, "
            f"digest {result['split']['digest']})",
        }
    )
    for row in result.get("by_position", ()):
        print_table(
            ("positions", "KL", "+-", "tokens"),
            [
                (
                    f"{bucket['first']} to {bucket['last']}",
                    f"{bucket['kl']:.6f}",
                    figure(bucket["stderr"], ".6f"),
                    f"{bucket['tokens']:,}",
                )
                for bucket in row["buckets"]
            ],
        )
