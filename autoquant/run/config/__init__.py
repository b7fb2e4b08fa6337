"""The configuration: what a settings file, the Python API and the command line all fill."""

from autoquant.run.config.base import Config, InvalidSetting
from autoquant.run.config.commands import (
    ExportConfig,
    PlanConfig,
    ProbeConfig,
    ScoreConfig,
    SearchConfig,
)

__all__ = [
    "Config",
    "ExportConfig",
    "InvalidSetting",
    "PlanConfig",
    "ProbeConfig",
    "ScoreConfig",
    "SearchConfig",
]
