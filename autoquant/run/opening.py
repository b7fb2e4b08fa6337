"""What a configuration names, opened: the model, its plan under a search space, its limits."""

from autoquant.decimals import shortest
from autoquant.errors import ConfigError
from autoquant.export.companions import require_sound_companions
from autoquant.plan.activation_mode import Target
from autoquant.plan.cost_table import CostTable
from autoquant.plan.limit import Limit
from autoquant.plan.model_costs import CostKind
from autoquant.plan.plan import Plan, make_plan
from autoquant.plan.space_file import load_space
from autoquant.run.config import PlanConfig, ProbeConfig, SearchConfig
from autoquant.run.config.parts import ModelConfig
from autoquant.source.source import REFERENCE_MODEL, Source, open_source

MOST_LIMITS = 2
"""Limits that the solver keeps at once."""


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
    """The model of a command under its search space; `autoquant plan` needs no weights, unless it
    is to measure.

    Raises:
        ConfigError: the search space is wrong, the model has no such cache, or inputs are to stay
            in BF16 that the machine does not quantize.
        SourceError: the model is missing, damaged or not understood.
    """
    space = load_space(config.space, config.effort)
    if config.a16_share:
        space = space.with_bf16_inputs()
    if isinstance(config, PlanConfig):
        return make_plan(open_model(config, weights=config.measure), space)
    if config.a16_share and config.served_by is not Target.BLACKWELL:
        raise ConfigError(
            f"--a16-share is {shortest(config.a16_share)}, and on {config.served_by} the inputs of "
            "NVFP4 layers are in BF16 as it is.",
            fix=f"leave --a16-share out, or search for --target {Target.BLACKWELL}.",
        )
    return make_plan(open_model(config), space, config.kv_cache)


def limits_of(config: SearchConfig, plan: Plan) -> tuple[Limit, ...]:
    """What every assignment of a search under one budget keeps: the budget, and perhaps a table's
    limit or a share of multiply-adds.

    Raises:
        ConfigError: a cost table without a limit or a limit without a table, a table that cannot
            be read or has no row for a group in a choice, or a table and a share.
    """
    limits = [plan.limit(config.budget, config.cost)]
    if config.a16_share:
        limits.append(Limit.of(plan.cost(CostKind.A16_PRODUCTS), config.a16_share))
    if config.cost_table is not None or config.cost_limit is not None:
        limits.append(_limit_of_table(config, plan))
    if len(limits) > MOST_LIMITS:
        raise ConfigError(
            "--a16-share and --cost-table are two limits beside the budget: a search takes one.",
            fix="leave one of them out; a cost table may have rows for nvfp4/a16.",
        )
    return tuple(limits)


def _limit_of_table(config: SearchConfig, plan: Plan) -> Limit:
    if config.cost_table is None or config.cost_limit is None:
        missing = "--cost-table" if config.cost_table is None else "--cost-limit"
        raise ConfigError(
            f"{missing} is missing: a table says what products cost, a limit the most of it.",
            fix="give both, or neither.",
        )
    table = CostTable.read(config.cost_table, plan.accounting)
    return Limit.of(table, config.cost_limit)
