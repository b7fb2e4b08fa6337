"""From weights and statistics to codes, by the format."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from autoquant.codes.cache import LinearCodes
from autoquant.codes.statistics import DriftStatistics, InputStatistics, StatisticsStore
from autoquant.codes.weights import Block, Unit, WeightSource
from autoquant.errors import SourceError
from autoquant.formats import Choice
from autoquant.formats.moments import Moments
from autoquant.formats.packed import Packed, Statistics
from autoquant.plan.linears import LayerGroup, Linear


class Encoder:
    """Encodes the weights of one source.

    Args:
        weights: of the source model.
        statistics: for choices that need moments of the inputs.
    """

    def __init__(self, weights: WeightSource, statistics: StatisticsStore | None) -> None:
        self.encoded = 0
        """Weights of which codes were made so far."""
        self._weights = weights
        self._statistics = statistics
        self._amax: dict[str, Tensor] = {}
        self._units: dict[str, tuple[Unit, ...]] = {}
        self._used_by = ""
        self._used: dict[tuple[int, torch.device], tuple[Moments, Moments]] = {}
        """Moments of the group that was encoded last, and the same on a device."""

    def of_other_weights(self, weights: WeightSource) -> Self:
        """One over the same weights from elsewhere, whose magnitudes are known as far as these."""
        other = type(self)(weights, self._statistics)
        other._amax = self._amax
        return other

    def units(self, group: LayerGroup) -> tuple[Unit, ...]:
        """How the group's weights are held."""
        if group.name not in self._units:
            self._units[group.name] = self._weights.units(group)
        return self._units[group.name]

    def digest(self, group: LayerGroup, choice: Choice) -> str | None:
        """Of the statistics that a group's codes rest on; empty without any, None if missing."""
        if not choice.format.needs_moments(choice):
            return ""
        return self._moments().digest(group.layer, group.input_sets)

    def unit(self, group: LayerGroup, unit: Unit, choice: Choice) -> Packed:
        """The codes of one unit of a group.

        Raises:
            SourceError: the weight holds NaN or Inf, or it or its statistics cannot be read.
        """
        with self._weights.block(unit.layer) as block:
            return self._encoded(group, unit, block.weight(unit), choice, block)

    def group(
        self,
        group: LayerGroup,
        choice: Choice,
        statistics: DriftStatistics | None = None,
        made: LinearCodes | None = None,
    ) -> LinearCodes:
        """The codes of a group, those of one input and one scale set made together.

        So they do not depend on which of its linears the source joins.

        Args:
            group: all of its linears.
            choice: of the codes.
            statistics: of other inputs than the BF16 model's.
            made: codes of the group from before, for units of which `statistics` knows nothing;
                without them those have plain codes.

        Raises:
            SourceError: as for `unit`.
        """
        packed: dict[str, Packed] = {}
        plain: dict[str, str] = {}
        with self._weights.block(group.layer) as block:
            for together in _cohorts(self.units(group)):
                unit = _joined(together)
                is_known = statistics is None or statistics.knows(unit)
                if made is not None and not is_known:
                    names = [linear.name for matrix in unit.matrices for linear in matrix]
                    packed |= {name: made.packed[name] for name in names}
                    plain |= {name: made.plain[name] for name in names if name in made.plain}
                    continue
                weights = [block.weight(own) for own in together]
                weight = weights[0] if len(weights) == 1 else torch.cat(weights)
                own_choice = choice if is_known else choice.plain
                found = self._encoded(group, unit, weight, own_choice, block, statistics)
                for number, matrix in enumerate(unit.matrices):
                    own = found.of_expert(number) if unit.is_stack else found
                    for place, (linear, first, last) in enumerate(rows_of(matrix)):
                        packed[linear.name] = own.of_rows(first, last)
                        if (number, place) in found.plain:
                            plain[linear.name] = found.plain[number, place]
        return LinearCodes(packed, plain)

    def _encoded(
        self,
        group: LayerGroup,
        unit: Unit,
        weight: Tensor,
        choice: Choice,
        block: Block,
        inputs: InputStatistics | None = None,
    ) -> Packed:
        statistics = Statistics(weight_amax=self._amax_of(group, unit, block))
        if choice.format.needs_moments(choice):
            inputs = inputs or self._moments()
            drift = inputs.drift(unit)
            statistics = replace(
                statistics,
                moments=self._on_device(group, inputs.moments(unit), weight.device),
                drift=None if drift is None else drift.to(weight.device),
                rows=tuple(linear.out_features for linear in unit.matrices[0]),
            )
        self.encoded += 1
        return choice.format.encode(weight, choice, statistics)

    def _on_device(self, group: LayerGroup, moments: Moments, device: torch.device) -> Moments:
        """The same, with what was worked out of them for other choices of the group."""
        if self._used_by != group.name:
            for _, moved in self._used.values():
                moved.kept.clear()
            self._used_by, self._used = group.name, {}
        key = id(moments), device
        if key not in self._used:
            self._used[key] = moments, moments.to(device)
        return self._used[key][1]

    def _moments(self) -> StatisticsStore:
        assert self._statistics is not None, "the choice needs statistics of the inputs"
        return self._statistics

    def _amax_of(self, group: LayerGroup, unit: Unit, block: Block) -> Tensor:
        """Largest magnitude over the scale set of each matrix: float32, 0-dimensional or [E]."""
        missing = set(unit.scale_sets) - self._amax.keys()
        if missing:
            for other in self.units(group):
                if missing & set(other.scale_sets):
                    self._widen(other, block.weight(other))
        found = torch.stack([self._amax[name] for name in unit.scale_sets])
        return found if unit.is_stack else found[0]

    def _widen(self, unit: Unit, weight: Tensor) -> None:
        for name, matrix in zip(
            unit.scale_sets, weight if unit.is_stack else [weight], strict=True
        ):
            lowest, highest = torch.aminmax(matrix)
            own = torch.maximum(-lowest, highest).float().cpu()
            if not own < float("inf"):
                raise SourceError(
                    f"{unit.matrices[0][0].tensor} in {unit.origin} holds NaN or Inf.",
                    fix="repair or download the model again; such a weight has no scale.",
                )
            self._amax[name] = torch.maximum(own, self._amax.get(name, own))


def rows_of(matrix: Iterable[Linear]) -> Iterator[tuple[Linear, int, int]]:
    """Each linear that a matrix joins, with its first row and the one after its last."""
    first = 0
    for linear in matrix:
        yield linear, first, first + linear.out_features
        first += linear.out_features


def _cohorts(units: Iterable[Unit]) -> Iterator[tuple[Unit, ...]]:
    """Units that are rows of one matrix, as engines fuse them; stacks of experts alone."""
    found: dict[tuple[str, ...], list[Unit]] = {}
    for unit in units:
        first = unit.matrices[0][0]
        key = (first.weight_scale_set, first.input_scale_set, str(first.in_features))
        found.setdefault((unit.name,) if unit.is_stack else key, []).append(unit)
    yield from map(tuple, found.values())


def _joined(units: tuple[Unit, ...]) -> Unit:
    if len(units) == 1:
        return units[0]
    return replace(units[0], matrices=(tuple(own for unit in units for own in unit.matrices[0]),))
