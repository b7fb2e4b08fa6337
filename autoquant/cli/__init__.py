"""The command line: one module per command, loaded when it is called."""

import signal

import click

import autoquant
from autoquant import collector
from autoquant.cli.group import LazyGroup

MODULES = {
    "search": "autoquant.cli.commands.search",
    "join": "autoquant.cli.commands.join",
    "plan": "autoquant.cli.commands.plan",
    "probe": "autoquant.cli.commands.probe",
    "equalize": "autoquant.cli.commands.equalize",
    "score": "autoquant.cli.commands.score",
    "export": "autoquant.cli.commands.export",
    "verify": "autoquant.cli.commands.verify",
    "evaluate": "autoquant.cli.commands.evaluate",
    "receipt": "autoquant.cli.commands.receipt",
    "report": "autoquant.cli.commands.report",
    "compare": "autoquant.cli.commands.compare",
    "spaces": "autoquant.cli.commands.spaces",
    "env": "autoquant.cli.commands.environment",
}
"""Command to module, in the order of `--help`; each module defines the click command `command`."""


@click.group(
    "autoquant",
    cls=LazyGroup,
    modules=MODULES,
    examples=[
        ("autoquant search --budget-bpe 5.0", "Search the bundled reference model:"),
        ("autoquant search Qwen/Qwen3-30B-A3B --budget-bpe 5.0", "Search a model of the hub:"),
        ("autoquant plan ./my-model", "See sizes and limits, no weights read:"),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(autoquant.__version__, prog_name="autoquant")
@click.option("--debug", is_flag=True, help="On an error, print the traceback.")
def cli(debug: bool) -> None:
    """Choose NVFP4, FP8 or BF16 for every layer of a language model, by measured KL."""


def main() -> None:
    """Entry point of the console script; a termination request is an interrupt, so runs resume."""
    collector.rest()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cli.main(prog_name="autoquant")
