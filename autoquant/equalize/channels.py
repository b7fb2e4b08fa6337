"""How large channels are on calibration text, and the powers of two that bring them nearer."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.data.tokens import Split
from autoquant.equalize.sites import Site
from autoquant.formats.moments import FEWEST_TOKENS
from autoquant.forward.flow import Flow, loop, walk
from autoquant.measure.scorer import Scorer
from autoquant.measure.statistics.chunks import Chunk, chunks_of
from autoquant.measure.statistics.taps import InputTaps
from autoquant.measure.statistics.weighing import by_layer, layers_at
from autoquant.plan.linears import LayerGroup

MOST_POWERS = 8
"""Powers of two by which a channel is scaled, at most."""

_SMALLEST = 1e-3
"""Channels that are smaller than this share of the mean count as that: they may speak elsewhere."""


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """What one matrix of an input set has shown."""

    squares: Tensor
    """Sums over rows, float64 [K], on the host."""
    rows: int

    def plus(self, other: "Channels") -> "Channels":
        """Both together."""
        return Channels(self.squares + other.squares, self.rows + other.rows)


Seen = Mapping[str, Mapping[int, Channels]]
"""By input set, and by its matrix."""


def seen_channels(
    scorer: Scorer, split: Split, groups: Collection[LayerGroup], advance: Callable[[], None]
) -> Seen:
    """The sizes of all inputs of `groups` in BF16.

    Args:
        scorer: all groups in BF16.
        split: the calibration tokens.
        groups: whose inputs are looked at.
        advance: called after each stage of the model.
    """
    visitor = _Watch(scorer, split, groups, advance)
    loop(scorer.trunk, [visitor])
    return visitor.seen


def final_states(scorer: Scorer, split: Split) -> Tensor:
    """The final hidden states [1, L, H] of the first sequence in BF16, on the host: alone, since
    how many go together depends on the memory that is free.
    """
    flow = Chunk(split.batches[0][:1].to(scorer.device), 0).flow(scorer)
    walk(scorer.trunk, scorer.quantized, scorer.room, [flow])
    return flow.hidden.cpu()


class _Watch:
    """The visitor that takes calibration sequences through each stage."""

    def __init__(
        self,
        scorer: Scorer,
        split: Split,
        groups: Collection[LayerGroup],
        advance: Callable[[], None],
    ) -> None:
        self.seen: dict[str, dict[int, Channels]] = {}
        self.flows: list[Flow] = [chunk.flow(scorer) for chunk in chunks_of(scorer, split)]
        self._scorer, self._advance = scorer, advance
        self._groups = by_layer(groups)

    @torch.no_grad()
    def visit(self, stage: int) -> None:
        trunk, room, quantized = self._scorer.trunk, self._scorer.room, self._scorer.quantized
        if stage == 0:
            for flow in self.flows:
                flow.begin()
        with ExitStack() as installed:
            for layer in layers_at(self._groups, self._scorer, stage):
                taps = InputTaps(quantized, self._groups[layer], self._see)
                installed.enter_context(taps.installed())
            for flow in self.flows:
                flow.advance(trunk, stage, room)
        self._advance()

    def _see(self, name: str, matrix: int, rows: Tensor, _: Tensor | None) -> None:
        own = Channels(rows.float().square().sum(dim=0).double().cpu(), len(rows))
        of_set = self.seen.setdefault(name, {})
        of_set[matrix] = of_set[matrix].plus(own) if matrix in of_set else own


def powers_of(site: Site, seen: Seen, strength: float) -> Tensor:
    """The exponents by which a site's channels are scaled, int8 [K]; zeros where too few tokens
    were seen, or none of them had a size.

    A channel of root mean square r goes to 2^k r with 2^k near (m / r)^strength, m the geometric
    mean of all (SmoothQuant, arXiv 2211.10438, of inputs alone).
    """
    of_set = seen.get(site.input_set, {})
    own = [*of_set.values()] if site.matrix is None else [*filter(None, [of_set.get(site.matrix)])]
    nothing = torch.zeros(site.channels, dtype=torch.int8)
    if not own or sum(each.rows for each in own) < FEWEST_TOKENS:
        return nothing
    squares = torch.stack([each.squares for each in own]).sum(dim=0)
    size = squares.sqrt()
    if not size.isfinite().all() or not size.any():
        return nothing
    logs = size.clamp(min=_SMALLEST * size.mean().item()).log2()
    wanted = strength * (logs.mean() - logs)
    return wanted.round().clamp(-MOST_POWERS, MOST_POWERS).to(torch.int8)


@dataclass(frozen=True, slots=True, eq=False)
class Powers:
    """By which powers of two a tensor is scaled."""

    rows: Tensor | None = None
    """Exponents along its first axis, int8."""
    columns: Tensor | None = None
    """Exponents along its last axis, int8."""

    def scaled(self, tensor: Tensor) -> Tensor:
        """The tensor [N] or [N, K] times its powers, in its dtype.

        Raises:
            ValueError: a number leaves the dtype's range, or loses a digit.
        """
        found = tensor
        if self.rows is not None:
            found = _times(found, self.rows.view(-1, *[1] * (tensor.ndim - 1)))
        if self.columns is not None:
            found = _times(found, self.columns)
        return found


def _times(tensor: Tensor, exponents: Tensor) -> Tensor:
    """tensor x 2^exponents, exactly."""
    scale = torch.exp2(exponents.float()).to(tensor.dtype)
    found = tensor * scale
    if not torch.equal(found / scale, tensor) or not found.isfinite().all():
        raise ValueError("its numbers leave the range of their dtype")
    return found


def by_tensor(sites: Sequence[Site], powers: Sequence[Tensor]) -> dict[str, Powers]:
    """What every tensor is scaled by; those that stay are left out."""
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for site, own in zip(sites, powers, strict=True):
        if own.any():
            rows |= dict.fromkeys(site.rows, own)
            columns |= dict.fromkeys(site.columns, -own)
    return {
        name: Powers(rows.get(name), columns.get(name)) for name in dict.fromkeys((*rows, *columns))
    }
