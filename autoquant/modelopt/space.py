"""What ModelOpt's arguments leave open, as a search space over the layer groups of a model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self

from torch import nn

from autoquant.errors import ConfigError, InfeasibleBudget
from autoquant.export.layouts.presets import wished_choices
from autoquant.formats import BF16, Choice
from autoquant.model.binding import Names, bind
from autoquant.plan.accounting import BYTE_BITS
from autoquant.plan.grouping import Groups, find_groups
from autoquant.plan.linears import LayerGroup
from autoquant.plan.plan import Plan, make_plan
from autoquant.plan.space import ROLE, Rule, SearchSpace
from autoquant.source.names import LEFT_ROLES
from autoquant.source.source import Source

DEFAULT_BITS = 4.8
"""Of `effective_bits`, as ModelOpt documents it."""

NAME = "modelopt"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Choices of the modules that a pattern names."""

    patterns: tuple[str, ...]
    choices: tuple[Choice, ...]

    def matches(self, module: str) -> bool:
        return any(fnmatchcase(module, pattern) for pattern in self.patterns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """The arguments of `auto_quantize` that say what may be chosen."""

    effective_bits: float
    disabled: tuple[str, ...]
    """Globs over module names."""
    parts: tuple[_Part, ...]
    choices: tuple[Choice, ...]
    """Of every other module."""

    @classmethod
    def of(
        cls,
        constraints: Mapping[str, Any] | None,
        formats: Sequence[Mapping[str, Any] | str] | None,
        disabled_layers: Sequence[str] | str | None,
        module_search_spaces: Sequence[Mapping[str, Any]] | None,
        fixed: Mapping[str, Any] | str | None,
    ) -> Self:
        """Read ModelOpt's arguments.

        Raises:
            ConfigError: a constraint or a format that AutoQuant does not know.
        """
        asked = dict(constraints or {})
        bits = asked.pop("effective_bits", DEFAULT_BITS)
        if asked.pop("cost_model", "weight") != "weight" or asked:
            raise ConfigError(
                "the constraints hold more than effective_bits and the cost model `weight`.",
                fix="autoquant.search has cost='active-bytes' for what a token reads, and search "
                "spaces for what is not to be counted.",
            )
        if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0 < bits <= 16:
            raise ConfigError(
                f"effective_bits is {bits!r}.", fix="write a number above 0 and up to 16."
            )
        if fixed is not None and (formats is not None or not module_search_spaces):
            raise ConfigError(
                "fixed_quantization_config is for what module_search_spaces does not name.",
                fix="give module_search_spaces with it, and no quantization_formats.",
            )
        others = wished_choices([fixed]) if fixed is not None else (*wished_choices(formats), BF16)
        disabled = [disabled_layers] if isinstance(disabled_layers, str) else disabled_layers
        return cls(
            effective_bits=float(bits),
            disabled=tuple(disabled or ()),
            parts=tuple(map(_part, module_search_spaces or ())),
            choices=others,
        )

    def of_modules(self, modules: Sequence[str]) -> tuple[Choice, ...]:
        """The choices of modules that share a format.

        Raises:
            ConfigError: only some of them are named by a search space, or two name them.
        """
        if any(fnmatchcase(m, pattern) for m in modules for pattern in self.disabled):
            return (BF16,)
        found = [part for part in self.parts if any(map(part.matches, modules))]
        if len(found) > 1 or (found and not all(map(found[0].matches, modules))):
            raise ConfigError(
                f"module_search_spaces names only a part of {', '.join(modules)}, or names it "
                "twice; engines need one format for all of it.",
                fix="widen the pattern to all of these modules.",
            )
        return found[0].choices if found else self.choices


def _part(space: Mapping[str, Any]) -> _Part:
    patterns, formats = space.get("module_name_patterns"), space.get("quantization_formats")
    if not patterns or not formats:
        raise ConfigError(
            "an entry of module_search_spaces lacks module_name_patterns or quantization_formats.",
            fix="give both.",
        )
    choices = wished_choices(formats)
    return _Part(
        patterns=(patterns,) if isinstance(patterns, str) else tuple(patterns),
        choices=(*choices, BF16) if space.get("allow_no_quant", True) else choices,
    )


def plan_of(source: Source, model: Any, wishes: Wishes) -> tuple[Plan, dict[str, tuple[str, ...]]]:
    """The model's plan under the wishes, and the modules in memory of every group.

    Linears that no serving engine's table knows stay in BF16, as in every search.

    Raises:
        ConfigError: the wishes leave nothing to choose, or split a group.
    """
    groups = find_groups(source)
    modules = modules_of(model, groups)
    rules = [
        Rule(
            match=(_pattern(group),),
            choices=_ordered(wishes.of_modules(modules[group.name])),
            reason="",
        )
        for group in groups
        if group.role not in LEFT_ROLES
    ]
    space = SearchSpace(
        name=NAME,
        description="What the arguments of auto_quantize leave open.",
        shared_experts="with_routed",
        rules=tuple(rules),
    )
    plan = make_plan(source, space)
    if not plan.options.open:
        raise ConfigError(
            "no linear is left with more than one format.",
            fix="disable fewer layers, or give more formats.",
        )
    return plan, modules


def modules_of(model: Any, groups: Groups) -> dict[str, tuple[str, ...]]:
    """The modules in memory that hold the weights of each group, by the group's name.

    Raises:
        SourceError: the model has no module for a group.
    """
    named = {module: name for name, module in model.named_modules()}
    names = Names(model)
    return {g.name: tuple(named[slot.module] for slot in bind(names, g)) for g in groups}


def searched_budget(
    plan: Plan, model: Any, modules: Mapping[str, Sequence[str]], wishes: Wishes
) -> float:
    """Bits per element of the open groups that leave `effective_bits` to all linears together.

    ModelOpt counts every linear, disabled ones at 16 bits, and no scale of a whole tensor.

    Raises:
        InfeasibleBudget: not even the cheapest choices keep `effective_bits`.
    """
    accounting = plan.accounting
    elements = sum(_linear_elements(model)) + sum(
        group.elements for group in plan.groups if _is_stack(model, modules[group.name])
    )
    closed = [g for g in plan.groups if g.name not in accounting.searched]
    in_groups = sum(group.elements for group in plan.groups)
    bits = 16 * (elements - in_groups) + BYTE_BITS * sum(
        accounting.group_bytes(g.name, plan.options.choices[g.name][0]) for g in closed
    )
    left = wishes.effective_bits * elements - bits
    floor = BYTE_BITS * accounting.searched_bytes(plan.floor)
    if left < floor:
        raise InfeasibleBudget(
            f"effective_bits is {wishes.effective_bits:g}, and the cheapest formats take "
            f"{(bits + floor) / elements:.4f} of all linears together.",
            fix="raise effective_bits, or disable fewer layers.",
        )
    return left / accounting.searched_elements


def _linear_elements(model: Any) -> Iterator[int]:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module.weight.numel()


def _is_stack(model: Any, modules: Sequence[str]) -> bool:
    """Whether a group's weights are experts in 3-D parameters, which are no `nn.Linear`."""
    return not all(isinstance(model.get_submodule(name), nn.Linear) for name in modules)


def _pattern(group: LayerGroup) -> str:
    """What names this group in a rule, and no role."""
    return f"{group.name[:-1]}[{group.name[-1]}]" if ROLE.fullmatch(group.name) else group.name


def _ordered(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """The cheapest format first, as search spaces have it."""
    return tuple(sorted(dict.fromkeys(choices), key=lambda choice: choice.format.weight_bits))
