"""A search from plain settings, as the command line and the Python API give them."""

from collections.abc import Mapping
from typing import Any

from autoquant.data.tokens import TokenPlan
from autoquant.errors import ConfigError
from autoquant.export.layouts.base import Layout
from autoquant.measure.method import ProbeMethod
from autoquant.model.inputs import ActivationMode
from autoquant.plan.budget import Budget, Scope
from autoquant.plan.kv_cache import KvCache
from autoquant.plan.model_costs import CostKind
from autoquant.plan.space_file import load_space
from autoquant.run.config import SearchConfig
from autoquant.source.source import REFERENCE_MODEL, open_source


def make_configs(settings: Mapping[str, Any]) -> list[SearchConfig]:
    """A search for each of `settings["budget_bpe"]`, all else as in `make_config`.

    A single budget is exported unless told otherwise, several only when told.
    """
    budgets = settings["budget_bpe"]
    export = settings["export"] if settings["export"] is not None else len(budgets) == 1
    return [make_config({**settings, "budget_bpe": bpe, "export": export}) for bpe in budgets]


def make_config(settings: Mapping[str, Any]) -> SearchConfig:
    """The search that `settings` describe, named as in `config.resolved.yaml`, and `export`.

    Raises:
        ConfigError: the search space is wrong, or Optuna is to propose more trials than there are.
        SourceError: the model is missing, damaged or not understood.
    """
    _require_trials_for_optuna(settings["trials"], settings["reweight_trials"])
    return SearchConfig(
        space=load_space(settings["space"]),
        budget=Budget(settings["budget_bpe"], Scope(settings["budget_scope"])),
        cost=CostKind(settings["cost"]),
        source=open_source(settings["model"] or REFERENCE_MODEL, revision=settings["revision"]),
        calibration=settings["calibration"],
        tokens=token_plan(settings),
        mode=ActivationMode(settings["activation_mode"]),
        probe=ProbeMethod(settings["probe"]),
        trials=settings["trials"],
        reweight_trials=settings["reweight_trials"],
        max_seconds=settings["max_seconds"],
        max_tokens=settings["max_tokens"],
        seed=settings["seed"],
        device=settings["device"],
        trust_remote_code=settings["trust_remote_code"],
        export=settings["export"],
        layout=Layout(settings["layout"]),
        kv_cache=KvCache(settings["kv_cache"]),
    )


def _require_trials_for_optuna(trials: int, reweight_trials: int) -> None:
    if reweight_trials > trials:
        raise ConfigError(
            f"--reweight-trials is {reweight_trials} and --trials {trials}: what Optuna proposes "
            "is a part of the trials.",
            fix=f"write --reweight-trials {trials} or less, or --trials {reweight_trials} or more.",
        )


def token_plan(settings: Mapping[str, Any]) -> TokenPlan:
    """The tokens that the data options of a command ask for."""
    return TokenPlan(
        calibration=settings["calibration_tokens"],
        search=settings["search_tokens"],
        report=settings["report_tokens"],
        sequence_length=settings["sequence_length"],
        batch_tokens=settings["batch_tokens"],
        seed=settings["seed"],
        all_experts=settings["calibrate_all_experts"],
    )
