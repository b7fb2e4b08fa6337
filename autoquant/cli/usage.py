"""What click finds wrong with a command line, as the two lines of every other error."""

import difflib

import click


def explain(error: click.UsageError) -> tuple[str, str]:
    """What is wrong in one line, and the way out."""
    suggests = isinstance(error, (click.NoSuchOption, click.NoSuchCommand))
    what = error.message if suggests else error.format_message()  # suggestions are the way out
    return f"{_one_line(what).rstrip('.')}.", _way_out(error)


def _way_out(error: click.UsageError) -> str:
    context = error.ctx
    if context is None:
        return "see `autoquant --help`."
    if isinstance(error, click.NoSuchCommand):
        return _nearest_command(error.command_name, context)
    if isinstance(error, click.NoSuchOption):
        if error.possibilities:
            return f"write {error.possibilities[0]}."
        return f"`{context.command_path} --help` lists the options."
    param = _param_of(error, context)
    if isinstance(param, click.Option):
        return _as_documented(param, context)
    usage = _one_line(context.command.get_usage(context)).removeprefix("Usage: ")
    too_much = "" if param else "; quote a name that has a space in it"
    return f"write `{usage}`{too_much}."


def _nearest_command(name: str, context: click.Context) -> str:
    group = context.command
    known = group.list_commands(context) if isinstance(group, click.Group) else []
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"write `{context.command_path} {close[0]}`."
    return f"commands are: {', '.join(known)}."


def _param_of(error: click.UsageError, context: click.Context) -> click.Parameter | None:
    """The parameter that the error is about, if it is about one."""
    if isinstance(error, click.BadParameter):
        return error.param
    if isinstance(error, click.BadOptionUsage):
        flags = (param for param in context.command.params if error.option_name in param.opts)
        return next(flags, None)
    return None


def _as_documented(option: click.Option, context: click.Context) -> str:
    value = "" if option.is_flag else f" {option.make_metavar(context)}"
    purpose = (option.help or "").partition("  [")[0].rstrip(".")
    if not purpose[:2].isupper():
        purpose = f"{purpose[:1].lower()}{purpose[1:]}"
    return f"write `{option.opts[-1]}{value}`: {purpose}."


def _one_line(text: str) -> str:
    return " ".join(text.split())
