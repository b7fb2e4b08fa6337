"""A configuration: settings checked once, whoever gives them, and written as text by one function.

The YAML file, the Python API and the command line fill the same configurations; the fields are
their only validator.
"""

import os
import shlex
from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from autoquant.decimals import shortest
from autoquant.environment import redact
from autoquant.errors import ConfigError
from autoquant.run.config.setting import HEADINGS, SettingField

SCHEMA_VERSION = 1
"""Of settings files."""


class InvalidSetting(ConfigError):
    """A value that a setting cannot take.

    Args:
        field: the setting.
        rule: the value and the rule that it breaks.
    """

    def __init__(self, field: SettingField, rule: str) -> None:
        super().__init__(
            f"Invalid value for '{field.flag}': {rule}.", fix="see help(autoquant.search)."
        )
        self.name = field.name
        self.rule = rule


class Config(BaseModel):
    """The settings of one command; every field is annotated with a `Setting`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    command: ClassVar[str]
    """The command that these are the settings of."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The configuration of these settings; what is not given keeps its default.

        Raises:
            InvalidSetting: a value has the wrong type, is out of its range or misses.
            ConfigError: two settings do not go together.
            TypeError: there is no such setting.
        """
        unknown = values.keys() - cls.model_fields.keys()
        if unknown:
            raise TypeError(f"`{cls.command}` has no setting {sorted(unknown)[0]!r}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = SettingField(str(first["loc"][0]), cls.model_fields[str(first["loc"][0])])
            raise InvalidSetting(field, field.rule(first)) from None

    @classmethod
    def settings(cls) -> dict[str, SettingField]:
        """Every field by its name, by heading in the order of `HEADINGS`."""
        fields = [SettingField(name, info) for name, info in cls.model_fields.items()]
        fields.sort(key=lambda field: HEADINGS.index(field.setting.heading))
        return {field.name: field for field in fields}

    def saved(self) -> dict[str, Any]:
        """The settings in force as a settings file holds them, JSON values."""
        values = self.model_dump(mode="json", exclude_none=True)
        names = (name for name, field in self.settings().items() if field.setting.is_saved)
        return {
            "schema_version": SCHEMA_VERSION,
            **{name: values[name] for name in names if name in values},
        }

    def command_line(self) -> str:
        """The command that gives these settings, for a shell; defaults are left out."""
        arguments: list[str] = []
        flags: list[str] = []
        for name, field in self.settings().items():
            value = getattr(self, name)
            default = field.info.get_default(call_default_factory=True, validated_data=dict(self))
            if value != default and field.setting.is_argument:
                arguments.append(_written(value))
            elif value != default:
                flags += _flag(field, value)
        if any(argument.startswith("-") for argument in arguments):
            return shlex.join(["autoquant", self.command, *flags, "--", *arguments])
        return shlex.join(["autoquant", self.command, *arguments, *flags])

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Paths as text, and nothing but a yes or no for a setting that is one."""
        assert info.field_name is not None
        field = SettingField(info.field_name, cls.model_fields[info.field_name])
        if isinstance(value, bool) and field.kind is not bool:
            raise ValueError(field.not_valid(value))
        return os.fspath(value) if isinstance(value, os.PathLike) else value


def _flag(field: SettingField, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [field.flag if value else f"--{field.setting.opposite}"]
    text = _written(value)
    if field.setting.is_secret:
        text = redact(text) or text
    return [f"{field.flag}={text}"] if text.startswith("-") else [field.flag, text]


def _written(value: Any) -> str:
    """A value as its flag takes it."""
    if isinstance(value, tuple):
        return ",".join(map(_written, value))
    if isinstance(value, float):
        return shortest(value)
    return str(value.value if isinstance(value, Enum) else value)
