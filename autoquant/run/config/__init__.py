"""The configuration: what a settings file, the Python API and the command line all fill."""

from autoquant.run.config.base import Config, InvalidSetting
from autoquant.run.config.commands import (
    ExportConfig,
    JoinConfig,
    PlanConfig,
    ProbeConfig,
    ScoreConfig,
    SearchConfig,
)
from autoquant.run.config.evaluating import EvaluateConfig, ReceiptConfig
from autoquant.run.config.parts import MeasuredConfig

__all__ = [
    "Config",
    "EvaluateConfig",
    "ExportConfig",
    "InvalidSetting",
    "JoinConfig",
    "MeasuredConfig",
    "PlanConfig",
    "ProbeConfig",
    "ReceiptConfig",
    "ScoreConfig",
    "SearchConfig",
]
