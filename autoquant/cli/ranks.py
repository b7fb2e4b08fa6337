"""What processes print that a launcher has started together: one of them speaks for all."""

from collections.abc import Iterator
from contextlib import contextmanager

import click

from autoquant.cli.group import INTERRUPTED_EXIT_CODE
from autoquant.errors import AutoQuantError, RankLost


@contextmanager
def one_voice() -> Iterator[None]:
    """End without a word inside where another process tells the same."""
    from autoquant.measure.ranks.group import is_follower
    from autoquant.measure.ranks.together import OF_THE_LEADER

    try:
        yield
    except RankLost as error:
        if error.is_first:
            raise
        raise click.exceptions.Exit(error.exit_code) from error
    except KeyboardInterrupt:
        if is_follower():
            raise click.exceptions.Exit(INTERRUPTED_EXIT_CODE) from None
        raise
    except Exception as error:
        if OF_THE_LEADER not in getattr(error, "__notes__", ()):
            raise
        code = error.exit_code if isinstance(error, AutoQuantError) else AutoQuantError.exit_code
        raise click.exceptions.Exit(code) from error
