"""Options, their headed groups in `--help`, and the examples below them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class HeadedOption(click.Option):
    """An option that `--help` lists under a heading."""

    def __init__(self, *args: Any, heading: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


class HeadedCommand(click.Command):
    """A command whose `--help` lists options under headings, with examples below.

    Args:
        examples: (command line, what it does) in the order shown.
    """

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each heading with its options as they come, and what has none under "Other"."""
        records: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):
                records.setdefault(getattr(param, "heading", "Other"), []).append(record)
        for heading, rows in records.items():
            with formatter.section(heading):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the worked examples."""
        write_examples(formatter, self.examples)
        super().format_epilog(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; an error knows its context, which click may leave out.

        Raises:
            click.UsageError: a flag is wrong.
        """
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise


def write_examples(formatter: click.HelpFormatter, examples: Sequence[tuple[str, str]]) -> None:
    """Write (command line, what it does) pairs; command lines are never wrapped."""
    if examples:
        with formatter.section("Examples"):
            for line, purpose in examples:
                formatter.write_text(purpose)
                formatter.write(f"{'':>{formatter.current_indent + 2}}{line}\n")


def option(*declarations: str, heading: str, **attributes: Any) -> Decorator:
    """Declare an option under `heading`; its default is shown unless told otherwise."""
    attributes.setdefault("show_default", True)
    return click.option(*declarations, cls=HeadedOption, heading=heading, **attributes)


def out_option(metavar: Literal["FILE", "DIR"], purpose: str) -> Decorator:
    """`--out FILE` or `--out DIR`, passed on as `out: Path | None`."""
    return option(
        "--out",
        heading="Output",
        type=click.Path(file_okay=metavar == "FILE", dir_okay=metavar == "DIR", path_type=Path),
        metavar=metavar,
        help=purpose,
    )


def format_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--format human|json`, passed on as `format: str`."""
    return option(
        "--format",
        heading="Output",
        type=click.Choice(["human", "json"]),
        default="human",
        help="How to print the result.",
    )(function)
