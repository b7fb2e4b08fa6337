"""Commands whose options are the settings of a configuration.

A setting comes from its flag, else from `--config FILE`, else it is the default; the field of the
configuration checks it, wherever it comes from.
"""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import click
from click.types import OptionHelpExtra

from autoquant.cli.options import HeadedCommand, HeadedOption
from autoquant.errors import ConfigError
from autoquant.run.config import Config, InvalidSetting
from autoquant.run.config.file import read_settings
from autoquant.run.config.setting import SettingField


class SettingOption(HeadedOption):
    """The option of one setting. It hands on what was typed, or None; the field checks it."""

    def __init__(self, field: SettingField) -> None:
        setting = field.setting
        flags = field.flag if setting.opposite is None else f"{field.flag}/--{setting.opposite}"
        super().__init__(
            [flags],
            heading=setting.heading,
            type=_type_of(field),
            is_flag=field.kind is bool,
            default=None,
            metavar=setting.metavar,
            help=setting.help,
        )
        self._field = field

    def get_help_extra(self, ctx: click.Context) -> OptionHelpExtra:
        """The default, the range and whether there must be a value, as the field says them."""
        extra: OptionHelpExtra = {}
        if default := _default_in_words(self._field):
            extra["default"] = default
        if bounds := self._field.bounds:
            extra["range"] = bounds
        if self._field.info.is_required():
            extra["required"] = "required"
        return extra


class ConfiguredCommand(HeadedCommand):
    """A command that hands its settings to its function as one argument, `config`.

    Args:
        config: the settings; each is an option, or an argument that the setting asks for.
    """

    def __init__(
        self,
        *args: Any,
        config: type[Config],
        params: Sequence[click.Parameter] | None = None,
        **kwargs: Any,
    ) -> None:
        own = [_parameter(field) for field in config.settings().values()]
        super().__init__(*args, params=[*own, *(params or ()), _file_option()], **kwargs)
        self.config = config

    def invoke(self, ctx: click.Context) -> Any:
        """Call the function.

        Raises:
            ConfigError: a setting of the file is wrong, or two settings do not go together.
            click.UsageError: a flag is wrong, or one is missing.
        """
        typed = {name: ctx.params.pop(name) for name in self.config.settings()}
        ctx.params["config"] = self._configuration(ctx, ctx.params.pop("settings_file"), typed)
        return super().invoke(ctx)

    def _configuration(
        self, ctx: click.Context, file: Path | None, typed: dict[str, Any]
    ) -> Config:
        flags = {name: value for name, value in typed.items() if value is not None}
        values = (read_settings(file, self.config) if file is not None else {}) | flags
        params = {param.name: param for param in self.params}
        for name, field in self.config.settings().items():
            if field.info.is_required() and name not in values:
                raise click.MissingParameter(ctx=ctx, param=params[name])
        try:
            return self.config.of(values)
        except InvalidSetting as error:
            if error.name in flags:
                raise click.BadParameter(error.rule, ctx=ctx, param=params[error.name]) from error
            raise ConfigError(
                f"{file}: {error.name}: {error.rule}.", fix=f"correct `{error.name}` in the file."
            ) from error


def _parameter(field: SettingField) -> click.Parameter:
    if field.setting.is_argument:
        return click.Argument([field.name], required=False, metavar=field.setting.metavar)
    return SettingOption(field)


def _file_option() -> click.Parameter:
    return HeadedOption(
        ["--config", "settings_file"],
        heading="Output",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="YAML file of settings; flags win over it.",
    )


def _type_of(field: SettingField) -> Any:
    """What helps a shell to complete the value, and names the choices in `--help`."""
    if field.choices:
        return click.Choice(field.choices)
    if field.kind is bool:
        return click.BOOL
    return click.Path() if field.kind is Path else click.STRING


def _default_in_words(field: SettingField) -> str:
    """What holds where nothing is given; empty where that says nothing."""
    default = field.info.get_default()
    if field.setting.unset is not None:
        return field.setting.unset
    if isinstance(default, bool):
        said_no = field.setting.opposite or ""
        return field.flag.removeprefix("--") if default else said_no
    if default is None or field.info.is_required():
        return ""
    return str(default.value if isinstance(default, Enum) else default)
