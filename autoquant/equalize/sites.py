"""Channels whose size nothing but two products sees, by the names of tensors.

Between a norm and all that reads it, and between the up and the down projection of a gated
feed-forward, a channel may have any size: the tensors before it are scaled along their rows, and
those behind it are scaled back along their columns. What a name says is checked by what the scaled
model computes (`copy.py`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from autoquant.plan.linears import LayerGroup, Linear
from autoquant.source.headers import TensorHeader
from autoquant.source.names import LAYER, ROUTED_EXPERT

DTYPES = ("BF16", "F32")
"""Dtypes in which a power of two loses no digit: float16 has too few exponents."""

_NORM_OF_ATTENTION = "input_layernorm"
_NORMS_OF_FEED_FORWARD = ("pre_feedforward_layernorm", "post_attention_layernorm")
_ATTENTION, _FEED_FORWARD = frozenset({"qkv", "qkv_a"}), frozenset({"gate_up", "shared_gate_up"})
_DOWN = {"down_proj": ("gate_proj", "up_proj"), "w2": ("w1", "w3")}
"""The down projection of a gated feed-forward, and the gate and the up projection before it."""


class Part(StrEnum):
    """Which channels of a block."""

    ATTENTION = "attention"
    """What queries, keys and values read."""
    FEED_FORWARD = "feed-forward"
    """What the feed-forward and its router read."""
    DOWN = "down"
    """What down projections read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Channels that may have any size."""

    part: Part
    name: str
    """Of the tensor that makes them."""
    channels: int
    """K."""
    input_set: str
    """What reads them, as the input scale set of linears."""
    matrix: int | None
    """The expert that alone reads them; None where all readers of the set do."""
    rows: tuple[str, ...]
    """Tensors [K] or [K, ...] that make them."""
    columns: tuple[str, ...]
    """Tensors [N, K] that read them."""


def find_sites(tensors: Mapping[str, TensorHeader], groups: Iterable[LayerGroup]) -> list[Site]:
    """The sites of every block, as far as all of their tensors can be scaled.

    Args:
        tensors: of the model, by name.
        groups: all layer groups.
    """
    blocks: dict[int, list[LayerGroup]] = {}
    for group in groups:
        if group.layer is not None:
            blocks.setdefault(group.layer, []).append(group)
    linears = {own.tensor for part in blocks.values() for group in part for own in group.linears}
    others = [own for own in tensors.values() if len(own.shape) == 2 and own.name not in linears]
    found = (site for own in blocks.values() for site in _sites_of(own, tensors, others))
    return [site for site in found if _can_be_scaled(site, tensors)]


def _sites_of(
    groups: Sequence[LayerGroup],
    tensors: Mapping[str, TensorHeader],
    others: Sequence[TensorHeader],
) -> Iterator[Site]:
    """Those of one block; `others` are matrices that take no format, such as routers."""
    linears = {own.name: own for group in groups for own in group.linears}
    match = LAYER.fullmatch(next(iter(linears)))
    if match is None:
        return
    layer = match["layer"]
    second = next((n for n in _NORMS_OF_FEED_FORWARD if f"{layer}.{n}.weight" in tensors), None)
    if second is not None:  # the only norm of a block is read by both of its halves
        attention = [own for group in groups if group.role in _ATTENTION for own in group.linears]
        wide = [own for group in groups for own in group.linears if _reads_the_norm(group, own)]
        for part, norm, readers in (
            (Part.ATTENTION, _NORM_OF_ATTENTION, attention),
            (Part.FEED_FORWARD, second, wide),
        ):
            if readers and f"{layer}.{norm}.weight" in tensors:
                beside = _beside(layer, readers, others)
                yield _behind_norm(part, f"{layer}.{norm}", readers, beside, tensors)
    for own in linears.values():
        yield from _before_down(own, linears, tensors)


def _reads_the_norm(group: LayerGroup, linear: Linear) -> bool:
    """Whether a linear of the feed-forward reads what its norm gives."""
    if group.role in _FEED_FORWARD:
        return True
    return group.role == "experts" and linear.name.rpartition(".")[2] not in _DOWN


def _beside(layer: str, readers: Sequence[Linear], others: Sequence[TensorHeader]) -> list[str]:
    """Those that stand beside the readers of a norm and are as wide: they read it too."""
    names = {own.name.removeprefix(f"{layer}.").partition(".")[0] for own in readers}
    prefixes = tuple(f"{layer}.{name}." for name in names)
    width = readers[0].in_features
    return [own.name for own in others if own.shape[1] == width and own.name.startswith(prefixes)]


def _behind_norm(
    part: Part,
    norm: str,
    readers: Sequence[Linear],
    others: Sequence[str],
    tensors: Mapping[str, TensorHeader],
) -> Site:
    return Site(
        part=part,
        name=norm,
        channels=readers[0].in_features,
        input_set=readers[-1].input_scale_set,
        matrix=None,
        rows=tuple(name for name in (f"{norm}.weight", f"{norm}.bias") if name in tensors),
        columns=(*(own.tensor for own in readers), *others),
    )


def _before_down(
    down: Linear, linears: Mapping[str, Linear], tensors: Mapping[str, TensorHeader]
) -> Iterator[Site]:
    """Between the up and the down projection of one gated feed-forward, or of one expert."""
    container, _, last = down.name.rpartition(".")
    if last not in _DOWN:
        return
    gate, up = (linears.get(f"{container}.{part}") for part in _DOWN[last])
    if gate is None or up is None or up.out_features != down.in_features:
        return
    expert = ROUTED_EXPERT.fullmatch(down.name)
    yield Site(
        part=Part.DOWN,
        name=up.name,
        channels=down.in_features,
        input_set=down.input_scale_set,
        matrix=int(expert["index"]) if expert else None,
        rows=tuple(name for name in (up.tensor, f"{up.name}.bias") if name in tensors),
        columns=(down.tensor,),
    )


def _can_be_scaled(site: Site, tensors: Mapping[str, TensorHeader]) -> bool:
    own = [tensors[name] for name in (*site.rows, *site.columns)]
    return all(tensor.is_plain and tensor.dtype in DTYPES for tensor in own)
