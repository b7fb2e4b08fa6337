"""What a configuration names, opened: the model, its plan under a search space, its limits."""

from autoquant.errors import ConfigError
from autoquant.export.companions import require_sound_companions
from autoquant.plan.cost_table import CostTable
from autoquant.plan.limit import Limit
from autoquant.plan.plan import Plan, make_plan
from autoquant.plan.space_file import load_space
from autoquant.run.config import PlanConfig, ProbeConfig, SearchConfig
from autoquant.run.config.parts import ModelConfig
from autoquant.source.source import REFERENCE_MODEL, Source, open_source


def open_model(config: ModelConfig, *, weights: bool = True) -> Source:
    """The model of a command, the bundled one where none is named.

    Raises:
        SourceError: it is missing, damaged or not understood, or a file that comes with it is.
    """
    model = config.model or REFERENCE_MODEL
    source = open_source(model, revision=config.revision, weights=weights)
    if weights:
        require_sound_companions(source.path)
    return source


def open_plan(config: ProbeConfig | PlanConfig) -> Plan:
    """The model of a command under its search space; `autoquant plan` needs no weights.

    Raises:
        ConfigError: the search space is wrong, or the model has no such cache.
        SourceError: the model is missing, damaged or not understood.
    """
    space = load_space(config.space, config.effort)
    if isinstance(config, PlanConfig):
        return make_plan(open_model(config, weights=False), space)
    return make_plan(open_model(config), space, config.kv_cache)


def limits_of(config: SearchConfig, plan: Plan) -> tuple[Limit, ...]:
    """What every assignment of a search under one budget keeps: the budget, and a table's limit.

    Raises:
        ConfigError: a cost table without a limit or a limit without a table, or a table that cannot
            be read or has no row for a group in a choice.
    """
    budget = plan.limit(config.budget, config.cost)
    if config.cost_table is None and config.cost_limit is None:
        return (budget,)
    if config.cost_table is None or config.cost_limit is None:
        missing = "--cost-table" if config.cost_table is None else "--cost-limit"
        raise ConfigError(
            f"{missing} is missing: a table says what products cost, a limit the most of it.",
            fix="give both, or neither.",
        )
    table = CostTable.read(config.cost_table, plan.accounting)
    return budget, Limit.of(table, config.cost_limit)
