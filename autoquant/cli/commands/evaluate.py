"""`autoquant evaluate`: tasks of lm-evaluation-harness on the model as it is scored."""

from typing import TYPE_CHECKING

import click

from autoquant.cli.configured import ConfiguredCommand
from autoquant.cli.options import format_option
from autoquant.cli.output import print_json, print_table
from autoquant.run.config import EvaluateConfig

if TYPE_CHECKING:
    from autoquant.evaluate.evaluated import Evaluation


@click.command(
    "evaluate",
    cls=ConfiguredCommand,
    config=EvaluateConfig,
    examples=[
        (
            "autoquant evaluate runs/mine --tasks hellaswag,gsm8k",
            "A run's winner and BF16, side by side:",
        ),
        (
            'autoquant evaluate runs/mine --tasks items.jsonl.gz --assignment "winner,uniform fp8"',
            "Other assignments of the run, on items of a file, without the hub:",
        ),
        (
            "autoquant evaluate ./checkpoint --source ./my-model --tasks hellaswag --limit 1000",
            "An exported checkpoint:",
        ),
    ],
)
@format_option
def command(config: EvaluateConfig, format: str) -> None:
    """Run tasks of lm-evaluation-harness on the fake-quantized model, exactly as it is scored.

    Two assignments are compared on the same items, which is far sharper than two error bars.
    """
    from autoquant.cli.terminal import Terminal
    from autoquant.run.evaluation.tasks import evaluate_tasks

    with Terminal() as terminal:
        found = evaluate_tasks(config, terminal)
    if format == "json":
        print_json({"model": found.model, "target": found.target, "scores": found.table()})
    else:
        _print(found)


def _print(found: "Evaluation") -> None:
    from autoquant.report.words import fixed, task_cells

    header = (
        *("task", "figure", "assignment", "BPE", "KL"),
        *("value", "+-", "to BF16", "95 % interval", "items"),
    )
    rows = []
    for row in found.rows():
        candidate = found.candidate(row.score.name)
        rows.append(
            (
                *(row.score.task, row.metric.name, row.score.name),
                fixed(None if candidate is None else candidate.bpe, 3),
                fixed(None if candidate is None else candidate.kl, 5),
                *task_cells(row),
                row.score.items,
            )
        )
    print_table(header, rows)
