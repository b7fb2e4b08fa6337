"""`autoquant receipt`: hashes and KL of a checkpoint that anyone can measure again."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from autoquant.cli.configured import ConfiguredCommand
from autoquant.cli.options import format_option
from autoquant.cli.output import print_fields, print_json, print_table
from autoquant.run.config import ReceiptConfig

if TYPE_CHECKING:
    from autoquant.run.receipts.checking import Checked
    from autoquant.run.receipts.receipt import Receipt


@click.command(
    "receipt",
    cls=ConfiguredCommand,
    config=ReceiptConfig,
    examples=[
        ("autoquant receipt runs/mine", "Measure a run's checkpoint, and write receipt.json:"),
        ("autoquant receipt --check runs/mine/receipt.json", "See whether it holds:"),
        (
            "autoquant receipt ./downloaded --check receipt.json --source org/model "
            "--calibration text.jsonl",
            "A checkpoint of others, with its model and its text:",
        ),
    ],
)
@format_option
def command(config: ReceiptConfig, format: str) -> None:
    """Write one JSON with hashes of source, shards, tokens and code beside the KL, or check one."""
    from autoquant.cli.terminal import Terminal

    if config.check is not None:
        from autoquant.run.receipts.checking import check_receipt, require_hold

        with Terminal() as terminal:
            checked = check_receipt(config, config.check, terminal)
        _show(checked, format)
        require_hold(checked, config.check)
        return
    from autoquant.files import write_atomic
    from autoquant.report.html import writing
    from autoquant.run.receipts.making import make_receipt

    with Terminal() as terminal:
        receipt, checkpoint = make_receipt(config, terminal)
    target = config.out or checkpoint.resolve().parent / "receipt.json"
    with writing(target):
        write_atomic(target, receipt.text())
    if format == "json":
        print_json({"receipt": str(target), **receipt.model_dump(mode="json")})
    else:
        _print(receipt, target)


def _print(receipt: "Receipt", target: Path) -> None:
    kl = receipt.kl
    print_fields(
        {
            "receipt": target,
            "KL": f"{kl.mean:.6f}, {kl.low:.6f} to {kl.high:.6f} at {kl.confidence:.0%} {kl.unit} "
            f"({receipt.settings.target})",
            "noise floor": f"{kl.noise_floor:.3g}",
            "checkpoint": f"{receipt.checkpoint.checkpoint_bytes:,} bytes, "
            f"{receipt.checkpoint.bpe:.4f} bits per element",
            "source": receipt.source.digest,
            "tokens": f"{receipt.tokens.tokens:,}, digest {receipt.tokens.digest}",
            "code": f"AutoQuant {receipt.code.autoquant}, sha256 {receipt.code.digest}",
        }
    )


def _show(checked: "Checked", format: str) -> None:
    if format == "json":
        from dataclasses import asdict

        checks = [asdict(check) for check in checked.checks]
        print_json({"holds": checked.holds, "checks": checks})
        return
    print_table(
        ("part", "holds", "said", "found"),
        [
            (c.part, "yes" if c.holds else "differs" if c.is_note else "NO", c.said, c.found)
            for c in checked.checks
        ],
    )
    click.echo("the receipt holds" if checked.holds else "the receipt does not hold")
