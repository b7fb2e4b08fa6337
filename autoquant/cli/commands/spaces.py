"""`autoquant spaces`: the search spaces that AutoQuant ships, and how to write one."""

import click

from autoquant.cli.options import HeadedCommand, format_option
from autoquant.cli.output import print_json, print_table


@click.group("spaces")
def command() -> None:
    """List, show and describe search spaces.

    A search space says which layers may take which formats. Copy one that comes close, edit it,
    and pass the file as `--space FILE.yaml`.
    """


@command.command(
    "list",
    cls=HeadedCommand,
    examples=[("autoquant spaces list", "The spaces that --space knows by name:")],
)
@format_option
def list_spaces(format: str) -> None:
    """List the search spaces that AutoQuant ships."""
    from autoquant.plan.space_file import load_space, shipped_names

    spaces = [load_space(name) for name in shipped_names()]
    if format == "json":
        listed = [{"name": space.name, "description": space.description} for space in spaces]
        print_json({"spaces": listed})
    else:
        print_table(["space", "what it leaves open"], [(s.name, s.description) for s in spaces])


@command.command(
    "show",
    cls=HeadedCommand,
    examples=[("autoquant spaces show default > mine.yaml", "Begin a space of your own:")],
)
@click.argument("name")
def show_space(name: str) -> None:
    """Print the YAML of the search space NAME."""
    from autoquant.plan.space_file import shipped_text

    click.echo(shipped_text(name), nl=False)


@command.command(
    "schema",
    cls=HeadedCommand,
    examples=[
        ("autoquant spaces schema > space.schema.json", "Completion and checks in an editor:")
    ],
)
def print_schema() -> None:
    """Print the JSON schema of search spaces."""
    from autoquant.files import to_json
    from autoquant.plan.space_file import schema

    click.echo(to_json(schema(), indent=2))
