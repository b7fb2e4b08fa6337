"""Layer groups of a checkpoint, from the names and shapes on disk."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from autoquant.errors import ConfigError, SourceError
from autoquant.formats import all_formats
from autoquant.plan.joining import ONE_FORMAT, Matrix, looked_up, matrices
from autoquant.plan.linears import LayerGroup, Linear
from autoquant.source import names as table
from autoquant.source.architecture import ties_embeddings
from autoquant.source.engines.tables import EngineTable, engine_tables
from autoquant.source.headers import TensorHeader
from autoquant.source.names import Fixed
from autoquant.source.source import FLOAT_DTYPES, Source

SharedExperts = Literal["with_routed", "separate"]
"""Whether a shared expert takes its layer's routed format, or is a group of its own."""

_WEIGHT = ".weight"

_HELD_IN_PARTS = {"hrm_text": re.compile(r"gate_up_proj|gqkv_proj")}
"""By model type: matrices on disk whose rows transformers 5.23 holds in several linears."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedTensor:
    """A tensor that is copied as it is."""

    name: str
    reason: Fixed


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Every tensor of a checkpoint: in a layer group, or fixed for a reason."""

    groups: tuple[LayerGroup, ...] = field(repr=False)
    """In the order of the forward pass."""
    fixed: tuple[FixedTensor, ...] = field(repr=False)

    @cached_property
    def by_name(self) -> dict[str, LayerGroup]:
        return {group.name: group for group in self.groups}

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for group in self.groups for linear in group.linears)

    def __getitem__(self, name: str) -> LayerGroup:
        """The group of that name.

        Raises:
            ConfigError: the model has no such group.
        """
        try:
            return self.by_name[name]
        except KeyError:
            raise ConfigError(
                f"the model has no layer group {name!r}.",
                fix="`autoquant plan MODEL` lists the groups.",
            ) from None

    def __iter__(self) -> Iterator[LayerGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)


def find_groups(source: Source, *, shared_experts: SharedExperts = "with_routed") -> Groups:
    """The layer groups of a model.

    Raises:
        SourceError: nothing in the checkpoint is a linear of a decoder layer, or linears that
            share an input take it in different widths.
    """
    groups = group_tensors(
        source.headers.tensors, source.config, source.text_config, shared_experts=shared_experts
    )
    if not groups.groups:
        raise SourceError(
            f"{source.path} holds no linear layer that can be quantized{_example(groups)}.",
            fix="pass a causal language model whose linears are stored [out, in], one by one.",
        )
    _require_shared_widths(groups)
    return groups


def _require_shared_widths(groups: Groups) -> None:
    first: dict[str, Linear] = {}
    for linear in groups.linears:
        other = first.setdefault(linear.input_scale_set, linear)
        if linear.in_features != other.in_features:
            raise SourceError(
                f"{linear.name} takes {linear.in_features} inputs, and {other.name} "
                f"{other.in_features}: they share an input.",
                fix="download or save the model again; one of them has the wrong shape.",
            )


def _example(groups: Groups) -> str:
    """One matrix that could not be taken, with the reason; nothing where there is none."""
    for tensor in groups.fixed:
        if tensor.reason in (Fixed.TRANSPOSED, Fixed.FUSED_EXPERTS, Fixed.DTYPE, Fixed.UNKNOWN):
            return f": {tensor.name} is one of its {tensor.reason}"
    return ""


def group_tensors(
    tensors: Mapping[str, TensorHeader],
    config: Mapping[str, Any],
    text_config: Mapping[str, Any],
    *,
    shared_experts: SharedExperts = "with_routed",
) -> Groups:
    """Sort tensors into groups and fixed ones, by the tables of `grouping_table`."""
    engines = engine_tables(config, text_config)
    fixed: list[FixedTensor] = []
    modules: dict[str, TensorHeader] = {}
    for tensor in tensors.values():
        reason = _why_fixed(tensor, config, text_config, engines)
        if reason is None:
            modules[tensor.name.removesuffix(_WEIGHT)] = tensor
        else:
            fixed.append(FixedTensor(name=tensor.name, reason=reason))
    containers = _routed_containers(modules)
    hosts = containers if shared_experts == "with_routed" else frozenset()
    seats = _seats([*modules, *containers], engines)
    members: dict[tuple[str, str], list[tuple[Linear, Matrix | None]]] = {}
    for name, tensor in modules.items():
        routed = table.ROUTED_EXPERT.fullmatch(name)
        place = _place(name, seats.get(name), hosts)
        seat = seats.get(routed["container"] if routed else name)
        linear = _linear(tensor, place)
        if seat is not None and not routed:
            names = _engine_names(name, seat, text_config)
            linear = replace(linear, engine_names=names, is_known=seat.is_known)
        members.setdefault((place.group, place.role), []).append((linear, seat))
    groups = [_group(name, role, own) for (name, role), own in members.items()]
    if (why := table.CLOSED_EXPERTS.get(text_config.get("model_type", ""))) is not None:
        groups = [replace(g, closed=g.closed or why) if g.role == "experts" else g for g in groups]
    groups.sort(key=_forward_order)
    if text_config.get("model_type") in ONE_FORMAT:
        groups = _with_one_name(groups)
    return Groups(groups=tuple(groups), fixed=tuple(fixed))


def _with_one_name(groups: Iterable[LayerGroup]) -> list[LayerGroup]:
    """Groups, those that an engine looks up under one name as the first of them."""
    found: dict[str, LayerGroup] = {}
    of_name: dict[str, str] = {}
    for group in groups:
        names = {name for linear in group.linears for name in linear.engine_names}
        first = found.get(next((of_name[name] for name in names if name in of_name), ""))
        if first is not None:
            group = replace(
                first,
                linears=(*first.linears, *group.linears),
                closed=first.closed or group.closed,
                caution=first.caution or group.caution,
            )
        found[group.name] = group
        of_name |= dict.fromkeys(names, group.name)
    return list(found.values())


def engine_names(
    linears: Iterable[str], config: Mapping[str, Any], text_config: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """What else engines call the matrices that hold linears, by the linear's name on disk.

    Args:
        linears: names of all modules that may be linears.
        config: of the whole model.
        text_config: of its language model.
    """
    seats = _seats(linears, engine_tables(config, text_config))
    found = {name: _engine_names(name, seat, text_config) for name, seat in seats.items()}
    return {name: own for name, own in found.items() if own}


def _engine_names(
    linear: str, seat: Matrix | None, text_config: Mapping[str, Any]
) -> tuple[str, ...]:
    layer = table.LAYER.fullmatch(linear)
    if layer is None or seat is None:
        return ()
    own = tuple(f"{layer['layer']}.{name}" for name in seat.engine_names)
    others = (other for name in (*own, linear) for other in looked_up(name, text_config))
    return tuple(dict.fromkeys((*own, *others)))


def _seats(names: Iterable[str], engines: tuple[EngineTable, ...]) -> dict[str, Matrix]:
    """The engines' matrix of every linear, and container of experts, inside of a block."""
    blocks: dict[str, dict[str, str]] = {}
    for name in names:
        match = table.LAYER.fullmatch(name)
        if match and not table.ROUTED_EXPERT.fullmatch(name):
            blocks.setdefault(match["layer"], {})[match["rest"]] = name
    return {
        names[part]: matrix
        for names in blocks.values()
        for part, matrix in matrices(names, engines).items()
    }


def _group(name: str, role: str, members: list[tuple[Linear, Matrix | None]]) -> LayerGroup:
    seats = [seat for _, seat in members if seat is not None]
    return LayerGroup(
        name=name,
        role=role,
        layer=_layer(name),
        linears=tuple(sorted((linear for linear, _ in members), key=_natural)),
        closed=next((seat.closed for seat in seats if seat.closed), ""),
        caution=next((seat.caution for seat in seats if seat.caution), ""),
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a linear belongs."""

    group: str
    role: str
    weight_scale_set: str
    input_scale_set: str


def _why_fixed(
    tensor: TensorHeader,
    config: Mapping[str, Any],
    text_config: Mapping[str, Any],
    engines: tuple[EngineTable, ...],
) -> Fixed | None:
    components = tensor.name.split(".")
    for reason, pattern in table.FIXED_COMPONENTS:
        if any(map(pattern.fullmatch, components)):
            return reason
    layer, depth = _layer(tensor.name), text_config.get("num_hidden_layers")
    if layer is not None and isinstance(depth, int) and layer >= depth:
        return Fixed.MTP
    last = components[-2] if len(components) > 1 else ""
    for reason, pattern in table.FIXED_MODULES:
        if pattern.fullmatch(last):
            return Fixed.BIAS if tensor.name.endswith(".bias") else reason
    if table.INSIDE_ROUTER.fullmatch(tensor.name.rpartition(".")[0]):
        return Fixed.ROUTER
    shape_reason = _why_no_matrix(tensor)
    if shape_reason is not None:
        return shape_reason
    if config.get("model_type") in table.TRANSPOSED_MODELS:
        return Fixed.TRANSPOSED
    split = _HELD_IN_PARTS.get(text_config.get("model_type", ""))
    if split is not None and split.fullmatch(last):
        return Fixed.HELD_IN_PARTS
    if table.HEAD.fullmatch(last):
        return Fixed.TIED_HEAD if ties_embeddings(config, text_config) else None
    in_block = table.LAYER.fullmatch(tensor.name.removesuffix(_WEIGHT))
    if in_block is None:
        return Fixed.UNKNOWN
    is_known = any(engine.module(in_block["rest"]) is not None for engine in engines)
    return None if is_known or table.LINEAR.fullmatch(last) else Fixed.UNKNOWN


def _why_no_matrix(tensor: TensorHeader) -> Fixed | None:
    if tensor.name.endswith((".bias", "_bias")):
        return Fixed.BIAS
    if len(tensor.shape) < 2:
        return Fixed.VECTOR
    if len(tensor.shape) == 3 and table.FUSED_EXPERTS.fullmatch(tensor.name.removesuffix(_WEIGHT)):
        return Fixed.FUSED_EXPERTS
    if len(tensor.shape) > 2 and "conv" in tensor.name:
        return Fixed.CONVOLUTION
    if tensor.dtype not in FLOAT_DTYPES:
        return Fixed.DTYPE
    if len(tensor.shape) != 2 or not tensor.name.endswith(_WEIGHT) or not tensor.elements:
        return Fixed.UNKNOWN
    return None


def _place(name: str, matrix: Matrix | None, hosts_of_shared: frozenset[str]) -> _Place:
    routed = table.ROUTED_EXPERT.fullmatch(name)
    if routed:
        return _routed_place(routed["container"], name, routed["part"])
    if matrix is None:
        return _Place(name, "head", weight_scale_set=name, input_scale_set=name)
    layer = table.LAYER.fullmatch(name)
    group = f"{layer['layer']}.{matrix.name}" if layer else name
    if table.SHARED_EXPERT.fullmatch(name):
        container = f"{name.rpartition('.')[0].rpartition('.')[0]}.experts"
        is_usual = matrix.role not in table.LEFT_ROLES and not matrix.closed
        if container in hosts_of_shared and is_usual:
            return _Place(container, "experts", group, group)
        role = table.SHARED_EXPERT_ROLES.get(matrix.role, matrix.role)
        return _Place(group, role, group, group)
    return _Place(group, matrix.role, weight_scale_set=group, input_scale_set=group)


def _routed_place(container: str, name: str, part: str) -> _Place:
    """All experts of a layer share one input scale per product, and none of the weight's."""
    fused = next((row for row in table.FUSED if part in row.parts), None)
    expert = name.removesuffix(f".{part}")
    product = fused.name if fused else part
    return _Place(container, "experts", f"{expert}.{product}", f"{container}.{product}")


def _routed_containers(modules: Iterable[str]) -> frozenset[str]:
    matches = map(table.ROUTED_EXPERT.fullmatch, modules)
    return frozenset(match["container"] for match in matches if match)


def _linear(tensor: TensorHeader, place: _Place) -> Linear:
    return Linear(
        name=tensor.name.removesuffix(_WEIGHT),
        out_features=tensor.shape[0],
        in_features=tensor.shape[1],
        weight_scale_set=place.weight_scale_set,
        input_scale_set=place.input_scale_set,
        casts_to=_casts_to(tensor),
    )


def _casts_to(tensor: TensorHeader) -> str:
    """The format of the codes that a weight is stored as, if their scales are powers of two."""
    if tensor.scales is None or not tensor.scales.are_powers:
        return ""
    return next((f.name for f in all_formats() if f.kept_codes == tensor.stored_dtype), "")


def _layer(name: str) -> int | None:
    match = table.LAYER.fullmatch(name)
    return int(match["index"]) if match else None


def _natural(linear: Linear) -> list[tuple[int, str]]:
    """Sort key that puts expert 2 before expert 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in linear.name.split(".")]


def _forward_order(group: LayerGroup) -> tuple[bool, int, int, str]:
    return (group.layer is None, group.layer or 0, table.ROLES.index(group.role), group.name)
