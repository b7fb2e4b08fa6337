"""`autoquant search`: the main job."""

import click

from autoquant.cli.configured import ConfiguredCommand
from autoquant.cli.group import Interrupted, typed_command
from autoquant.cli.options import format_option
from autoquant.cli.output import print_json
from autoquant.cli.ranks import one_voice
from autoquant.run.config import SearchConfig


@click.command(
    "search",
    cls=ConfiguredCommand,
    config=SearchConfig,
    examples=[
        ("autoquant search --budget-bpe 5.0", "The bundled reference model:"),
        (
            "autoquant search ./my-model --budget-bpe 5.0 --calibration ./texts",
            "Your model on your text:",
        ),
        ("autoquant search --budget-bpe 4.8,5,5.5,6 --out runs/budgets", "Several budgets:"),
        (
            "autoquant search ./my-moe --budget-bpe 4.75 --space experts-only --trials 100",
            "Only the routed experts, with more trials:",
        ),
    ],
)
@format_option
def command(config: SearchConfig, format: str) -> None:
    """Search formats for every layer under a budget, and export the winner.

    Without MODEL, on the reference model that comes with AutoQuant.
    """
    from autoquant.cli.commands.search_output import print_frontier, print_result
    from autoquant.cli.terminal import Terminal
    from autoquant.measure.ranks.group import is_follower
    from autoquant.run.budgets import run_searches

    try:
        with one_voice(), Terminal() as terminal:
            outcomes = run_searches(config, terminal)
    except KeyboardInterrupt:
        raise Interrupted(typed_command()) from None
    if is_follower():
        return
    if format == "json":
        found = [outcome.result | {"run": str(outcome.path)} for outcome in outcomes]
        print_json(found[0] if len(found) == 1 else {"runs": found})
    elif len(outcomes) == 1:
        print_result(outcomes[0].result, outcomes[0].path)
    else:
        print_frontier([(outcome.result, outcome.path) for outcome in outcomes])
