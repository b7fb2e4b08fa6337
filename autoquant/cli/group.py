"""The command group: commands loaded when called, errors turned into two lines and an exit code."""

import errno
import importlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import click

from autoquant.cli.options import write_examples
from autoquant.cli.output import showing_warnings
from autoquant.cli.usage import explain
from autoquant.errors import (
    AutoQuantError,
    ConfigError,
    OutOfMemory,
    SourceError,
    first_line,
    one_line,
)
from autoquant.files import is_full

INTERRUPTED_EXIT_CODE = 130

EPILOG = """\b
Exit codes:
  0    done
  1    a bug in AutoQuant
  2    a flag, configuration file or search space is wrong
  3    the budget cannot be met
  4    model or data unavailable or damaged
  5    the run directory belongs to another search
  6    out of memory
  130  interrupted; the same command goes on where it stopped

\b
Shell completion, in ~/.bashrc (zsh_source for zsh, fish_source for fish):
  eval "$(_AUTOQUANT_COMPLETE=bash_source autoquant)"
"""


class Interrupted(KeyboardInterrupt):
    """The user stopped a command that can be continued.

    Args:
        resume: the command line that goes on where this one stopped.
    """

    def __init__(self, resume: str) -> None:
        super().__init__()
        self.resume = resume


def typed_command() -> str:
    """The command line as the user typed it; `--fresh` would not go on, so it is left out."""
    return shlex.join(["autoquant", *(a for a in sys.argv[1:] if a != "--fresh")])


class Failure(click.ClickException):
    """An error as the user sees it: one line that says what is wrong, one with the way out."""

    def __init__(self, message: str, fix: str, exit_code: int) -> None:
        super().__init__(one_line(message))
        self.fix = one_line(fix)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance

    def show(self, file: IO[Any] | None = None) -> None:
        """Print both lines to `file`, standard error by default."""
        click.echo(f"error: {self.message}\n  fix: {self.fix}", file=file or sys.stderr)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called or listed.

    Args:
        modules: command name to the module whose `command` it is, in the order of `--help`.
        examples: (command line, what it does) in the order shown.
    """

    def __init__(
        self,
        *args: Any,
        modules: Mapping[str, str],
        examples: Sequence[tuple[str, str]],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, epilog=EPILOG, **kwargs)
        self.modules = modules
        self.examples = examples

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command in table order."""
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in self.modules:
            return None
        command = importlib.import_module(self.modules[cmd_name]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write every command with its purpose, which click would cut to one line."""
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None:
                rows.append((name, (command.help or "").partition("\n")[0]))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the worked examples, the exit codes and how to complete."""
        write_examples(formatter, self.examples)
        super().format_epilog(ctx, formatter)

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Parse what precedes the command's name; a mistake leaves as a `Failure`."""
        with _usage_as_failure():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error leaves as a `Failure`, or as it is with `--debug`."""
        try:
            with _usage_as_failure(), showing_warnings():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt as interrupt:
            _show_interrupt(interrupt)
            ctx.exit(INTERRUPTED_EXIT_CODE)
        except Exception as error:
            if ctx.params["debug"]:
                raise
            raise _failure(error) from error


@contextmanager
def _usage_as_failure() -> Iterator[None]:
    """Give click's own errors the form of ours; a call without arguments still shows the help."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise Failure(*explain(error), ConfigError.exit_code) from error


def _show_interrupt(interrupt: KeyboardInterrupt) -> None:
    if isinstance(interrupt, Interrupted):
        click.echo(f"\ninterrupted; to go on from here:\n  {interrupt.resume}", file=sys.stderr)
    else:
        click.echo("\ninterrupted", file=sys.stderr)


def _failure(error: Exception) -> Failure:
    if isinstance(error, AutoQuantError):
        return Failure(error.message, error.fix, error.exit_code)
    line = first_line(error)
    if _is_out_of_memory(error):
        return Failure(
            f"out of memory: {line}",
            "free memory, use a larger machine or shorter sequences; "
            "a search goes on where it stopped.",
            OutOfMemory.exit_code,
        )
    if isinstance(error, OSError):
        return _refused_by_the_system(error, line)
    return Failure(
        f"AutoQuant failed on something that it should have handled: "
        f"{type(error).__name__}: {line}",
        "report it with the traceback (`autoquant --debug ...`) and `autoquant env`.",
        AutoQuantError.exit_code,
    )


def _refused_by_the_system(error: OSError, line: str) -> Failure:
    """What a disk, its permissions or a connection do not allow is the user's to mend."""
    if is_full(error):
        what, fix = "the disk is full or lets no file grow further", "free space"
    elif error.errno == errno.EROFS:
        what, fix = "the file system can only be read", "name a folder that can be written"
    elif isinstance(error, PermissionError):
        what, fix = "a permission is missing", "mend the permissions, or name another path"
    else:
        what, fix = "the system refuses", "check the path and the disk"
    return Failure(
        f"{what}: {line}", f"{fix}; a search goes on where it stopped.", SourceError.exit_code
    )


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's, an accelerator's, or PyTorch's CPU allocator's."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
