"""What a search could do with a model: groups, sizes and limits, from headers alone."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from autoquant.formats import BF16, all_formats
from autoquant.formats.kv_cache import KvCache
from autoquant.plan.accounting import Accounting
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Budget, Scope
from autoquant.plan.cost import Cost
from autoquant.plan.grouping import Groups, find_groups
from autoquant.plan.kv_cache import cache_bytes
from autoquant.plan.limit import Limit
from autoquant.plan.linears import LayerGroup
from autoquant.plan.model_costs import (
    A16Products,
    ActiveBytes,
    Bf16Products,
    CostKind,
    StoredBytes,
)
from autoquant.plan.space import Options, SearchSpace
from autoquant.source.architecture import knows
from autoquant.source.engines.refusals import Refusal, refusals
from autoquant.source.engines.tables import engines
from autoquant.source.names import UNKNOWN_ROLE, Fixed
from autoquant.source.source import Source

SCHEMA_VERSION = 1

LAYOUTS = tuple(dict.fromkeys(layout for form in all_formats() for layout in form.layouts))
"""How checkpoints are written for engines."""

LISTED = 8
"""Names in one warning."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model under a search space."""

    source: Source
    space: SearchSpace
    groups: Groups
    options: Options = field(repr=False)
    accounting: Accounting = field(repr=False)

    @property
    def floor(self) -> Assignment:
        """The legal assignment of the fewest bytes."""
        return self.accounting.floor

    @property
    def ceiling(self) -> Assignment:
        """The legal assignment of the most bytes."""
        return self.accounting.ceiling

    @property
    def probes(self) -> int:
        """Measurements of one group in one choice that a full probe makes."""
        choices = self.options.choices.values()
        return sum(choice != BF16 for own in choices for choice in own)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know before trusting the plan."""
        return (
            *source_warnings(self.source),
            *unknown_warnings(self.groups, self.options),
            *loading_warnings(self.refused_by),
            *self.options.warnings,
        )

    @cached_property
    def refused_by(self) -> tuple[Refusal, ...]:
        """Engines that do not load what a search may make, in some layout or in any."""
        return refused_by(self.source.config, self.groups, self.options.quantized)

    def cost(self, kind: CostKind, scope: Scope = Scope.CHECKPOINT) -> Cost:
        """A cost that follows from the model alone; multiply-adds are those of what is searched."""
        if kind is CostKind.BITS:
            return StoredBytes(accounting=self.accounting, scope=scope)
        text_config = self.source.text_config
        if kind is CostKind.ACTIVE_BYTES:
            return ActiveBytes(accounting=self.accounting, scope=scope, text_config=text_config)
        of_inputs = A16Products if kind is CostKind.A16_PRODUCTS else Bf16Products
        return of_inputs(accounting=self.accounting, text_config=text_config)

    def limit(self, budget: Budget, kind: CostKind = CostKind.BITS) -> Limit:
        """The budget of a cost, resolved for this model."""
        return Limit.of(self.cost(kind, budget.scope), budget.bpe)

    @cached_property
    def fixed_bytes(self) -> Mapping[str, int]:
        """Bytes of the tensors outside of every group, by the reason why they are fixed."""
        sizes: dict[str, int] = {}
        for tensor in self.groups.fixed:
            stored = self.source.headers[tensor.name].bytes
            sizes[tensor.reason] = sizes.get(tensor.reason, 0) + stored
        return sizes

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; sizes in bytes, BPE in bits per element."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.source.model,
            "revision": self.source.revision,
            "space": self.space.name,
            "elements": self.accounting.elements,
            "searched_elements": self.accounting.searched_elements,
            "source_bytes": self.source.headers.stored_bytes,
            "probes": self.probes,
            "floor": self._size(self.floor),
            "ceiling": self._size(self.ceiling),
            "groups": [self._group(group) for group in self.groups],
            "fixed": dict(self.fixed_bytes),
            "refused_by": [
                {"engine": own.engine, "layouts": [*own.layouts], "why": own.why}
                for own in self.refused_by
            ],
            "warnings": list(self.warnings),
        }

    def _size(self, assignment: Assignment) -> dict[str, Any]:
        return {
            "checkpoint_bytes": self.accounting.checkpoint_bytes(assignment),
            "bpe": {str(scope): self.accounting.bpe(assignment, scope) for scope in Scope},
        }

    def _group(self, group: LayerGroup) -> dict[str, Any]:
        choices = self.options.choices[group.name]
        closed = self.options.closed[group.name]
        sizes = {str(choice): self.accounting.group_bytes(group.name, choice) for choice in choices}
        return {
            "name": group.name,
            "role": group.role,
            "layer": group.layer,
            "linears": len(group.linears),
            "elements": group.elements,
            "choices": sizes,
            "closed": {str(format): closed[format] for format in all_formats() if format in closed},
        }


def source_warnings(source: Source) -> tuple[str, ...]:
    """What cannot be known of a model from what is there of it."""
    warnings = []
    kind = source.config.get("model_type")
    if not knows(kind):
        warnings.append(
            f"transformers knows no model of the type {kind!r}: groups are guessed from names, and "
            "a search needs the model's own code and --trust-remote-code."
        )
    if not source.has_weights:
        warnings.append(
            f"{source.path} holds no weights: sizes follow from its config.json, without the "
            "tensors that transformers does not build, such as multi-token prediction heads."
        )
    return tuple(warnings)


def unknown_warnings(groups: Groups, options: Options) -> tuple[str, ...]:
    """Linears and matrices that nothing is known of."""
    warnings = []
    matrices = [
        tensor.name
        for tensor in groups.fixed
        if tensor.reason is Fixed.UNKNOWN and tensor.name.endswith(".weight")
    ]
    left = [group for group in groups if _is_left(group, options)]
    unknown = [linear.name for group in left for linear in group.linears]
    if unknown:
        warnings.append(
            f"no engine's table and no rule knows {_listed(unknown)}: kept in BF16. A search space "
            "opens them by their names, or all of them by the role `unknown`."
        )
    if matrices:
        warnings.append(f"no rule knows {_listed(matrices)}: kept as they are.")
    return tuple(warnings)


def refused_by(
    config: Mapping[str, Any], groups: Groups, quantized: Mapping[str, Collection[str]]
) -> tuple[Refusal, ...]:
    """Engines that do not load a checkpoint, in some layout or in any.

    Args:
        config: of the whole model.
        groups: its layer groups.
        quantized: those that leave BF16, or may, with the names of their formats.
    """
    linears = [(linear.name, group) for group in groups for linear in group.linears]
    found = [
        own
        for own in refusals(config, LAYOUTS)
        if any(own.concerns(name, quantized.get(group.name, ())) for name, group in linears)
    ]
    hopeless = {own.engine for own in found if own.layouts == LAYOUTS}
    cautions: dict[str, list[str]] = {}
    for group in groups:
        if group.caution and group.name in quantized and group.caution not in hopeless:
            cautions.setdefault(group.caution, []).append(group.name)
    found += [
        Refusal(
            engine=engine,
            layouts=LAYOUTS,
            why=f"it builds {_listed(names)} without a quantization",
            without="keep them in BF16 by a search space",
        )
        for engine, names in cautions.items()
    ]
    return tuple(found)


def loading_warnings(refused: Collection[Refusal], layout: str | None = None) -> tuple[str, ...]:
    """What to tell of engines that do not load a checkpoint, and what to do instead.

    Args:
        refused: all of them.
        layout: of the checkpoint; without it, those are told of too that load one of the layouts.
    """
    return tuple(
        f"{own.engine} is not known to load a quantized checkpoint of this model"
        f"{_in_layouts(own)}: {own.why}. {_way_out(own, refused)}"
        for own in refused
        if layout is None or layout in own.layouts
    )


def _in_layouts(refusal: Refusal) -> str:
    if refusal.layouts == LAYOUTS:
        return ", in either layout"
    return f" in the layout {', '.join(refusal.layouts)}"


def _way_out(refusal: Refusal, refused: Collection[Refusal]) -> str:
    """A layout that the engine loads, or an engine that loads it, or none of them."""
    ways = [refusal.without] if refusal.without else []
    ways += [f"write it with --layout {name}" for name in LAYOUTS if name not in refusal.layouts]
    for engine in engines():
        closed = {layout for own in refused if own.engine == engine for layout in own.layouts}
        loaded = [layout for layout in LAYOUTS if layout not in closed]
        if loaded and engine != refusal.engine:
            form = f" (--layout {loaded[0]})" if closed else ""
            ways.append(f"serve it with {engine}{form}")
    text = (
        ", or ".join(ways) or "`autoquant score MODEL --checkpoint DIR` runs it without an engine"
    )
    return f"{text[0].upper()}{text[1:]}."


def _is_left(group: LayerGroup, options: Options) -> bool:
    return group.role == UNKNOWN_ROLE and not group.closed and _stays(group, options)


def _stays(group: LayerGroup, options: Options) -> bool:
    return options.choices[group.name] == (BF16,)


def _listed(names: Iterable[str]) -> str:
    """Names with `*` for the index of the layer, and how many layers have them."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    lines = [f"{name} ({n})" if n > 1 else name for name, n in counts.items()]
    more = f" and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    return ", ".join(lines[:LISTED]) + more


def make_plan(source: Source, space: SearchSpace, kv_cache: KvCache = KvCache.BF16) -> Plan:
    """Group the tensors of `source` and apply `space` to them.

    Raises:
        SourceError: the model has no linear that can be quantized.
        ConfigError: an FP8 cache for a model whose keys and values are not told apart.
    """
    groups = find_groups(source, shared_experts=space.shared_experts)
    options = space.options(groups)
    accounting = Accounting(
        headers=source.headers,
        groups=groups,
        choices=options.choices,
        added_bytes=cache_bytes(kv_cache, groups),
    )
    return Plan(source=source, space=space, groups=groups, options=options, accounting=accounting)
