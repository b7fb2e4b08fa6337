"""What a configuration names, opened: the model, its plan under a search space, its limits."""

from autoquant.plan.limit import Limit
from autoquant.plan.plan import Plan, make_plan
from autoquant.plan.space_file import load_space
from autoquant.run.config import PlanConfig, ProbeConfig, SearchConfig
from autoquant.run.config.parts import ModelConfig
from autoquant.source.source import REFERENCE_MODEL, Source, open_source


def open_model(config: ModelConfig, *, weights: bool = True) -> Source:
    """The model of a command, the bundled one where none is named.

    Raises:
        SourceError: it is missing, damaged or not understood.
    """
    return open_source(config.model or REFERENCE_MODEL, revision=config.revision, weights=weights)


def open_plan(config: ProbeConfig | PlanConfig) -> Plan:
    """The model of a command under its search space; `autoquant plan` needs no weights.

    Raises:
        ConfigError: the search space is wrong, or the model has no such cache.
        SourceError: the model is missing, damaged or not understood.
    """
    space = load_space(config.space)
    if isinstance(config, PlanConfig):
        return make_plan(open_model(config, weights=False), space)
    return make_plan(open_model(config), space, config.kv_cache)


def limits_of(config: SearchConfig, plan: Plan) -> tuple[Limit, ...]:
    """What every assignment of a search under one budget keeps."""
    return (plan.limit(config.budget, config.cost),)
