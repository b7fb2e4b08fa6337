"""`autoquant plan`: what a search could do with a model, before a weight is loaded."""

from collections import Counter
from typing import TYPE_CHECKING

import click

from autoquant.cli.configured import ConfiguredCommand
from autoquant.cli.options import format_option
from autoquant.cli.output import print_fields, print_json, print_table, warn
from autoquant.decimals import shortest
from autoquant.run.config import PlanConfig

if TYPE_CHECKING:
    from autoquant.formats import Format
    from autoquant.plan.budget import Budget
    from autoquant.plan.linears import LayerGroup
    from autoquant.plan.plan import Plan
    from autoquant.run.machines.forecast import Forecast
    from autoquant.run.machines.timing import Timing


@click.command(
    "plan",
    cls=ConfiguredCommand,
    config=PlanConfig,
    examples=[
        ("autoquant plan", "The bundled reference model:"),
        ("autoquant plan ./my-model --budget-bpe 5.0", "Can this budget be met?"),
        ("autoquant plan Qwen/Qwen3-30B-A3B --space experts-only", "Under another search space:"),
        ("autoquant plan ./my-model --forecast", "Will it fit this machine, and how?"),
        ("autoquant plan ./my-model --budget-bpe 5.0 --measure", "And how long will it take?"),
    ],
)
@format_option
def command(config: PlanConfig, format: str) -> None:
    """Print layer groups, sizes and possible budgets; reads no weights unless told to measure."""
    from autoquant.run.opening import open_plan

    plan, budget = open_plan(config), config.budget
    for warning in plan.warnings:
        warn(warning)
    if budget is not None:
        plan.limit(budget).require_feasible(plan.options.choices)
    forecast = _forecast(config, plan) if config.forecast or config.measure else None
    timing = _timing(config, plan, forecast) if forecast is not None and config.measure else None
    if format == "json":
        found = {
            "budget": _budget(plan, budget),
            "statistics_bytes": _statistics(plan),
            "forecast": None if forecast is None else forecast.to_dict(),
            "timing": None if timing is None else timing.to_dict(),
        }
        print_json(plan.to_dict() | found)
    else:
        _print(plan, budget, forecast, timing)


def _forecast(config: PlanConfig, plan: "Plan") -> "Forecast":
    from autoquant.run.machines.forecast import Forecast

    return Forecast.of(config, plan)


def _timing(config: PlanConfig, plan: "Plan", forecast: "Forecast") -> "Timing":
    from autoquant.run.machines.timing import Timing

    return Timing.of(config, plan, forecast)


def _budget(plan: "Plan", budget: "Budget | None") -> dict[str, object] | None:
    if budget is None:
        return None
    limit = plan.limit(budget).at_most
    return {"bpe": budget.bpe, "scope": str(budget.scope), "max_checkpoint_bytes": limit}


def _print(
    plan: "Plan",
    budget: "Budget | None",
    forecast: "Forecast | None",
    timing: "Timing | None",
) -> None:
    accounting = plan.accounting
    fields: dict[str, object] = {
        "model": plan.source.model,
        "space": plan.space.name,
        "elements": f"{accounting.elements:,}",
        "as it is": _size(plan.source.headers.stored_bytes),
        "ceiling": _limit(plan, ceiling=True),
        "floor": _limit(plan, ceiling=False),
    }
    if budget is not None:
        fields["budget"] = (
            f"{_size(plan.limit(budget).at_most)}, {shortest(budget.bpe)} bits per element "
            f"(scope {budget.scope})"
        )
    fields["probes"] = f"{plan.probes:,} (one group in one choice each)"
    if taken := _statistics(plan):
        fields["on disk"] = (
            f"{_size(taken)} of statistics for fitted codes; --effort fast has none but for those "
            "that the space names"
        )
    if forecast is not None:
        fields["in memory"] = forecast.in_words()
        if passes := forecast.passes_in_words():
            fields["passes"] = passes
    if timing is not None:
        fields["time"] = timing.in_words()
        fields["measured"] = timing.measured_in_words()
    print_fields(fields)
    click.echo()
    _print_groups(plan)
    closed = _closed(plan)
    if closed:
        click.echo()
        print_table(["closed", "groups", "why"], closed)
    if plan.fixed_bytes:
        click.echo()
        elements = accounting.elements
        print_table(
            ["fixed", "size", "bits per element"],
            [(why, _size(n), f"{8 * n / elements:.3f}") for why, n in plan.fixed_bytes.items()],
        )


def _statistics(plan: "Plan") -> int:
    """Bytes that a run directory holds while a search fits codes to inputs."""
    from autoquant.codes.statistics_size import groups_with_moments, statistics_bytes

    return statistics_bytes(groups_with_moments(plan.options.choices, tuple(plan.groups)))


def _limit(plan: "Plan", *, ceiling: bool) -> str:
    from autoquant.plan.budget import Scope

    assignment = plan.ceiling if ceiling else plan.floor
    size = _size(plan.accounting.checkpoint_bytes(assignment))
    whole = plan.accounting.bpe(assignment, Scope.CHECKPOINT)
    searched = plan.accounting.bpe(assignment, Scope.SEARCHED)
    return f"{size}, {whole:.3f} bits per element ({searched:.3f} of what is searched)"


def _print_groups(plan: "Plan") -> None:
    """One line for the groups of a role that may take the same choices."""
    alike: dict[tuple[str, str], list[LayerGroup]] = {}
    for group in plan.groups:
        choices = plan.options.choices[group.name]
        formats = dict.fromkeys(choice.form.upper() for choice in choices)
        alike.setdefault((group.role, " ".join(formats)), []).append(group)
    rows = []
    for (role, legal), groups in alike.items():
        floor = sum(plan.accounting.group_bytes(g.name, plan.floor[g.name]) for g in groups)
        ceiling = sum(plan.accounting.group_bytes(g.name, plan.ceiling[g.name]) for g in groups)
        elements = f"{sum(group.elements for group in groups):,}"
        rows.append((role, len(groups), elements, _size(floor), _size(ceiling), legal))
    print_table(["role", "groups", "elements", "smallest", "largest", "formats"], rows)


def _closed(plan: "Plan") -> list[tuple[str, int, str]]:
    """Formats that groups cannot take, by the reason."""
    counts: Counter[tuple[Format, str]] = Counter()
    for group in plan.groups:
        for format, reason in plan.options.closed[group.name].items():
            named = (f"{linear.name}: " for linear in group.linears if linear.name in reason)
            counts[format, f"{group.role}: {reason.removeprefix(next(named, ''))}"] += 1
    return [(format.label, count, why) for (format, why), count in counts.items()]


def _size(count: int) -> str:
    """Bytes in the unit of disks and of the hub."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
