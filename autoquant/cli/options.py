"""Options that commands share, headed groups in `--help`, and settings from a file.

A setting comes from its flag, else from `--config FILE`, else it is the default.
"""

import difflib
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from autoquant.errors import ConfigError

HEADINGS = ("Model", "Budget", "Search", "Data", "Tracking", "Output")
"""Headed groups of options, in the order of `--help`."""

CONFIG_SCHEMA_VERSION = 1

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class GroupedOption(click.Option):
    """An option that `--help` lists under a heading.

    Args:
        heading: one of `HEADINGS`.
        setting: whether a configuration file may hold it; False for what concerns one call.
    """

    def __init__(self, *args: Any, heading: str, setting: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if heading not in HEADINGS:
            raise ValueError(f"heading {heading!r} is none of {HEADINGS}")
        self.heading = heading
        self.setting = setting


class GroupedCommand(click.Command):
    """A command whose `--help` lists options under headings, with examples below.

    Args:
        examples: (command line, what it does) in the order shown.
    """

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each heading with its options, and what has none under "Other"."""
        records: dict[str, list[tuple[str, str]]] = {
            heading: [] for heading in (*HEADINGS, "Other")
        }
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):
                records[getattr(param, "heading", "Other")].append(record)
        for heading, rows in records.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the worked examples."""
        write_examples(formatter, self.examples)
        super().format_epilog(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; an error in a value from the configuration file names the file.

        Raises:
            ConfigError: the value is wrong.
            click.UsageError: a flag is wrong; it knows its context, which click may leave out.
        """
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            origin = ctx.meta.get("autoquant.config")
            name = error.param.name if error.param else None
            if origin and name and ctx.get_parameter_source(name) is ParameterSource.DEFAULT_MAP:
                raise ConfigError(
                    f"{origin}: {name}: {error.message}", fix=f"correct `{name}` in the file."
                ) from error
            raise
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
    return click.option(*declarations, cls=GroupedOption, heading=heading, **attributes)


def model_argument(*, required: bool) -> Decorator:
    """The argument MODEL: a folder or a hub id, passed on as `model: str | None`."""
    return click.argument("model", required=required, metavar="MODEL" if required else "[MODEL]")


def revision_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--revision`, passed on as `revision: str | None`."""
    return option(
        "--revision",
        heading="Model",
        default=None,
        metavar="NAME",
        help="Branch, tag or commit of a model on the hub.  [default: its main branch]",
        show_default=False,
    )(function)


class OneBudget(click.FloatRange):
    """A budget, bits per element, where a list of them has no meaning."""

    name = "budget"

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The budget of `4.75`.

        Raises:
            click.BadParameter: not a positive number, or a list.
        """
        if "," in str(value):
            self.fail(
                f"{value!r} has a comma: this command takes one budget, such as 5.5.", param, ctx
            )
        return super().convert(value, param, ctx)


class Budgets(click.ParamType[tuple[float, ...]]):
    """Budgets separated by commas, bits per element; a tuple of floats in the order given."""

    name = "budgets"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """The budgets of `4.75,5,5.5`.

        Raises:
            click.BadParameter: one of them is not a positive number, or is given twice.
        """
        if isinstance(value, tuple):
            return value
        one = OneBudget()
        budgets = tuple(one.convert(part.strip(), param, ctx) for part in str(value).split(","))
        if len(set(budgets)) < len(budgets):
            self.fail(f"{value!r} names a budget twice.", param, ctx)
        return budgets


def budget_options(*, required: bool, several: bool = False) -> Decorator:
    """`--budget-bpe` (bits per element) and `--budget-scope` (checkpoint or searched).

    Args:
        required: whether there must be a budget.
        several: whether there may be more than one, passed on as a tuple of floats.
    """
    purpose = "Most stored bits per element of the source model, scales included"
    return _stack(
        option(
            "--budget-bpe",
            heading="Budget",
            required=required,
            type=Budgets() if several else OneBudget(),
            metavar="BITS[,BITS...]" if several else "BITS",
            help=f"{purpose}; several share one set of probes." if several else f"{purpose}.",
        ),
        option(
            "--budget-scope",
            heading="Budget",
            type=click.Choice(["checkpoint", "searched"]),
            default="checkpoint",
            help="What the budget counts: the whole checkpoint, or the layers left open.",
        ),
    )


def space_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--space NAME|FILE`, passed on as `space: str`."""
    return option(
        "--space",
        heading="Search",
        default="default",
        metavar="NAME|FILE",
        help="Which layers may take which formats: a shipped space, or a YAML file.",
    )(function)


def activation_mode_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--activation-mode w4a4|w4a16`, passed on as `activation_mode: str`."""
    return option(
        "--activation-mode",
        heading="Search",
        type=click.Choice(["w4a4", "w4a16"]),
        default="w4a4",
        help="Whether NVFP4 layers see NVFP4 inputs (Blackwell) or BF16 inputs (Hopper).",
    )(function)


def kv_cache_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--kv-cache bf16|fp8`, passed on as `kv_cache: str`."""
    return option(
        "--kv-cache",
        heading="Search",
        type=click.Choice(["bf16", "fp8"]),
        default="bf16",
        help="How engines are to keep keys and values: fp8 calibrates and stores scales for them, "
        "and counts what it costs in KL.",
    )(function)


def layout_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--layout modelopt|compressed-tensors`, passed on as `layout: str`."""
    return option(
        "--layout",
        heading="Output",
        type=click.Choice(["modelopt", "compressed-tensors"]),
        default="modelopt",
        help="Who reads the checkpoint: vLLM, SGLang and TensorRT-LLM, or vLLM, SGLang and "
        "transformers. The same codes and scales.",
    )(function)


def assignment_option(*, required: bool) -> Decorator:
    """`--assignment FILE`, passed on as `assignment: Path | None`."""
    return option(
        "--assignment",
        heading="Model",
        setting=False,
        required=required,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Which group has which format, YAML or JSON, such as a search's assignment.yaml.",
    )


def out_option(
    metavar: Literal["FILE", "DIR"], purpose: str, *, required: bool = False
) -> Decorator:
    """`--out FILE` or `--out DIR`, passed on as `out: Path | None`."""
    return option(
        "--out",
        heading="Output",
        setting=False,
        required=required,
        type=click.Path(file_okay=metavar == "FILE", dir_okay=metavar == "DIR", path_type=Path),
        metavar=metavar,
        help=purpose,
    )


def probe_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--probe exact|screened|gradient`, passed on as `probe: str`."""
    return option(
        "--probe",
        heading="Search",
        type=click.Choice(["exact", "screened", "gradient"]),
        default="screened",
        help="How each layer's part is found out: its KL in every format (exact); in one format, "
        "the others scaled by gradients (screened); or gradients alone.",
    )(function)


def token_options(*, report: bool = True) -> Decorator:
    """`--calibration`, `--seed`, tokens of each split and sequence, and `--batch-tokens`.

    Args:
        report: whether there is a report split.
    """
    reported = _tokens("--report-tokens", 65_536, "Tokens that the finalists are confirmed on.")
    return _stack(
        option(
            "--calibration",
            heading="Data",
            default="stdlib",
            metavar="TEXT",
            help="Text or JSONL file, folder, or datasets id (org/name:split); stdlib is the "
            "source of Python's standard library.",
        ),
        option(
            "--seed",
            heading="Data",
            type=click.IntRange(min=0),
            default=0,
            metavar="N",
            help="Same seed, same tokens and same result.",
        ),
        _tokens("--calibration-tokens", 8_192, "Tokens that input ranges are taken from."),
        option(
            "--calibrate-all-experts",
            heading="Data",
            is_flag=True,
            help="Take input ranges from every expert on every token, not only on those routed to "
            "it; KL is measured with the model's own routing either way.",
        ),
        _tokens("--search-tokens", 16_384, "Tokens that probes and trials are measured on."),
        *([reported] if report else []),
        _tokens("--sequence-length", 256, "Longest sequence."),
        _tokens("--batch-tokens", 4_096, "Tokens of one forward."),
    )


def _tokens(flag: str, default: int, purpose: str) -> Decorator:
    return option(
        flag,
        heading="Data",
        type=click.IntRange(min=32),
        default=default,
        metavar="N",
        help=purpose,
    )


def device_options() -> Decorator:
    """`--device` and `--trust-remote-code`."""
    return _stack(
        option(
            "--device",
            heading="Model",
            default=None,
            metavar="NAME",
            help="cpu, cuda, cuda:1 ...  [default: the first GPU, else the CPU]",
        ),
        option(
            "--trust-remote-code",
            heading="Model",
            is_flag=True,
            help="Run code that comes with the model.",
        ),
    )


def tracking_options() -> Decorator:
    """`--mlflow/--no-mlflow`, `--mlflow-experiment` and `--mlflow-trials`."""
    return _stack(
        option(
            "--mlflow/--no-mlflow",
            heading="Tracking",
            default=True,
            help="Record the search in MLflow: MLFLOW_TRACKING_URI, else mlflow.db in the folder "
            "of runs.",
        ),
        option(
            "--mlflow-experiment",
            heading="Tracking",
            default="autoquant",
            metavar="NAME",
            help="Experiment to record under.",
        ),
        option(
            "--mlflow-trials",
            heading="Tracking",
            type=click.Choice(["all", "best", "none"]),
            default="all",
            help="Trials that get a child run of their own: each one, or only those that improve.",
        ),
    )


def format_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--format human|json`, passed on as `format: str`."""
    return option(
        "--format",
        heading="Output",
        setting=False,
        type=click.Choice(["human", "json"]),
        default="human",
        help="How to print the result.",
    )(function)


def config_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--config FILE`: YAML settings below the flags, keys as in `config.resolved.yaml`."""
    return option(
        "--config",
        heading="Output",
        setting=False,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_load_config,
        help="YAML file of settings; flags win over it.",
    )(function)


def resolved_settings(ctx: click.Context) -> dict[str, Any]:
    """Every setting of the call with the value in force, as `--config` reads it back."""
    settings = {
        name: _plain(value, param)
        for name, param in _settings_of(ctx.command).items()
        if (value := ctx.params[name]) is not None
    }
    return {"schema_version": CONFIG_SCHEMA_VERSION, **settings}


def _plain(value: Any, param: click.Parameter) -> Any:
    """A setting as a configuration file holds it."""
    if isinstance(param.type, Budgets):
        return value[0] if len(value) == 1 else ",".join(f"{item:g}" for item in value)
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _stack(*decorators: Decorator) -> Decorator:
    """One decorator that applies all; the first is listed first."""
    return lambda function: functools.reduce(
        lambda wrapped, decorate: decorate(wrapped), reversed(decorators), function
    )


def _settings_of(command: click.Command) -> dict[str, click.Parameter]:
    return {
        param.name: param
        for param in command.params
        if param.name and (isinstance(param, click.Argument) or getattr(param, "setting", False))
    }


def _load_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    settings = _read_yaml_mapping(path)
    version = settings.pop("schema_version", CONFIG_SCHEMA_VERSION)
    if version != CONFIG_SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema_version {version!r}, this version reads {CONFIG_SCHEMA_VERSION}.",
            fix=f"set schema_version: {CONFIG_SCHEMA_VERSION} after checking the file.",
        )
    known = _settings_of(ctx.command)
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"{path}: {key!r} is not a setting of `{ctx.info_name}`.", fix=_nearest(key, known)
            )
    ctx.meta["autoquant.config"] = str(path)
    ctx.default_map = {
        key: _as_written(value, known[key], path)
        for key, value in settings.items()
        if value is not None
    }


def _read_yaml_mapping(path: Path) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"configuration {path} cannot be read: {' '.join(str(error).split())}",
            fix="write YAML, one `setting: value` a line.",
        ) from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(
            f"configuration {path} holds a {type(settings).__name__}, not a mapping.",
            fix="write YAML, one `setting: value` a line.",
        )
    return {str(key): value for key, value in settings.items()}


def _nearest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return f"write {close[0]!r}." if close else f"settings are: {', '.join(sorted(known))}."


def _as_written(value: Any, param: click.Parameter, path: Path) -> Any:
    """The value as its flag would give it, so that flags and file pass the same checks."""
    takes_budgets = isinstance(param.type, Budgets)
    takes_many = getattr(param, "multiple", False) or takes_budgets
    values = value if takes_many and isinstance(value, list) else [value]
    for item in values:
        if isinstance(item, (list, dict)):
            raise ConfigError(
                f"{path}: {param.name} is {value!r}: it takes "
                f"{'a list of single values' if takes_many else 'a single value'}.",
                fix=f"correct `{param.name}` in the file.",
            )
    written = [item if isinstance(item, bool) else str(item) for item in values]
    if takes_budgets:
        return ",".join(map(str, written))
    return written if takes_many else written[0]
