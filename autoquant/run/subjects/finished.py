"""A finished run measured again: its model, its tokens and its calibration, as they were."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoquant.codes.cache import CodeCache
from autoquant.codes.statistics import StatisticsStore
from autoquant.errors import ConfigError, RunConflict
from autoquant.formats import BF16
from autoquant.measure.calibration import Calibration
from autoquant.measure.session import Session
from autoquant.plan.kv_cache import cached_attention
from autoquant.plan.plan import Plan
from autoquant.report.record import RunRecord
from autoquant.run.config import SearchConfig
from autoquant.run.config.file import read_settings
from autoquant.run.config.parts import MemoryConfig
from autoquant.run.measuring import open_measuring, use_calibration
from autoquant.run.observer import Observer
from autoquant.run.opening import open_plan
from autoquant.store.run_directory import CONFIG


@dataclass(frozen=True, kw_only=True)
class Reopened:
    """A run whose model is loaded."""

    config: SearchConfig
    """Of the run's own budget."""
    plan: Plan
    session: Session
    """With the input scales of the run's calibration."""


def require_finished(run: RunRecord) -> Mapping[str, Any]:
    """The result of a run.

    Raises:
        ConfigError: it is not finished.
    """
    if run.result is None:
        raise ConfigError(
            f"{run.path} is {run.status}: it has no result yet.",
            fix="let the search finish: the same command goes on with it.",
        )
    return run.result


def config_of(run: RunRecord, **changes: Any) -> SearchConfig:
    """The settings of a finished run under its own budget.

    Args:
        run: finished.
        changes: settings that no result depends on, such as the device.
    """
    budget = require_finished(run)["budget_bpe"]
    settings = read_settings(run.path / CONFIG, SearchConfig)
    return SearchConfig.of(settings | {"budget_bpe": [budget]} | changes)


def placing(config: MemoryConfig) -> dict[str, Any]:
    """Settings that say where a model is measured, as far as they are given."""
    names = ("device", "weights", "device_memory", "host_memory")
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def subject_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What everything depends on that is measured of a run."""
    return {
        "model": result["source"]["digest"],
        "budget_bpe": result["budget_bpe"],
        "tokens": {name: split["digest"] for name, split in result["tokens"].items()},
    }


def reopen(
    run: RunRecord,
    config: SearchConfig,
    observer: Observer,
    *,
    codes: CodeCache | None = None,
    statistics: StatisticsStore | None = None,
) -> Reopened:
    """Load the model of a finished run with its tokens and its calibration.

    Args:
        run: finished.
        config: as `config_of` gives it.
        observer: told of progress.
        codes: where costly codes are kept.
        statistics: where moments of the inputs are kept.

    Raises:
        ConfigError: the run is not finished.
        SourceError: model or text missing or damaged.
        RunConflict: model or text are no longer those of the run.
    """
    result = require_finished(run)
    plan = open_plan(config)
    session = open_measuring(
        config,
        plan.source,
        [group for group in plan.groups if plan.options.choices[group.name] != (BF16,)],
        cached_attention(config.kv_cache, plan.groups),
        observer,
        mode=config.mode,
        codes=codes,
        statistics=statistics,
    )
    tokens = {name: split.digest for name, split in session.splits.items()}
    subject = subject_of(result)
    if plan.source.digest != subject["model"] or tokens != subject["tokens"]:
        raise RunConflict(
            f"the model or the text of {run.path} has changed since.",
            fix="restore them, or search anew.",
        )
    use_calibration(session, Calibration.from_dict(run.calibration or {}), observer)
    return Reopened(config=config, plan=plan, session=session)
