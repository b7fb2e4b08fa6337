"""The one way to a quantized weight.

What is scored, exported and verified is what a `CodeBook` gives: codes are encoded by the format
from the weight and its statistics, and decoded by the format. Codes depend on the source model
alone, never on the rest of an assignment.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.codes.cache import CodeCache
from autoquant.codes.kept import Kept
from autoquant.codes.weights import Block, Unit, WeightSource
from autoquant.errors import SourceError
from autoquant.formats import Choice
from autoquant.formats.packed import Packed, Statistics
from autoquant.plan.linears import LayerGroup, Linear

Key = tuple[str, Choice]
"""A unit's name, and a choice."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a unit holds a linear."""

    unit: Unit
    matrix: int
    first: int
    last: int


class CodeBook:
    """Codes of every (group, choice): from memory, else from the disk, else encoded.

    Args:
        weights: of the source model.
        memory_bytes: for codes that are kept in memory; the last ones asked for are there in any
            case. Nearest rounding is encoded again where memory does not hold it.
        cache: on disk, for codes that cost more to make than to read; None keeps none.
    """

    def __init__(
        self, weights: WeightSource, *, memory_bytes: int, cache: CodeCache | None = None
    ) -> None:
        self.weights = weights
        self.cache = cache
        self._packed: Kept[Key, Packed] = Kept(memory_bytes)
        self._amax: dict[str, Tensor] = {}
        self._units: dict[str, tuple[Unit, ...]] = {}
        self._places: dict[str, dict[str, _Place]] = {}

    def unit(self, group: LayerGroup, unit: Unit, choice: Choice) -> Packed:
        """The codes of one unit of a group; the same whatever the choice's input.

        Raises:
            SourceError: the weight holds NaN or Inf, or cannot be read.
        """
        choice = choice.of_weight
        size = sum(
            choice.format.stored_bytes(own.out_features, own.in_features, choice)
            for matrix in unit.matrices
            for own in matrix
        )
        return self._packed.get(
            (unit.name, choice), size, lambda: self._read_or_encode(group, unit, choice)
        )

    def linear(self, group: LayerGroup, linear: Linear, choice: Choice) -> Packed:
        """The codes [N, ...] of one linear of a group: what its checkpoint stores."""
        place = self._places_of(group)[linear.name]
        packed = self.unit(group, place.unit, choice)
        if place.unit.is_stack:
            packed = packed.of_expert(place.matrix)
        return packed.of_rows(place.first, place.last)

    def give(self, group: LayerGroup, choice: Choice, linears: Mapping[str, Packed]) -> None:
        """Use these codes of a group from now on, such as those that a checkpoint stores.

        Args:
            group: all of whose linears are given.
            choice: under which they are used.
            linears: codes [N, ...] by the linear's name.
        """
        for unit in self.units(group):
            joined = [Packed.joined([linears[own.name] for own in m]) for m in unit.matrices]
            packed = Packed.stacked(joined) if unit.is_stack else joined[0]
            self._packed.put((unit.name, choice.of_weight), packed)

    def units(self, group: LayerGroup) -> tuple[Unit, ...]:
        """How the group's weights are held."""
        if group.name not in self._units:
            self._units[group.name] = self.weights.units(group)
        return self._units[group.name]

    def _read_or_encode(self, group: LayerGroup, unit: Unit, choice: Choice) -> Packed:
        is_costly = choice.format.is_costly(choice)
        if is_costly and self.cache is not None:
            found = self.cache.read(unit.name, choice)
            if found is not None:
                return found
        with self.weights.block(unit.layer) as block:
            statistics = Statistics(weight_amax=self._amax_of(group, unit, block))
            packed = choice.format.encode(block.weight(unit), choice, statistics)
        if is_costly and self.cache is not None:
            self.cache.write(unit.name, packed)
        return packed

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

    def _places_of(self, group: LayerGroup) -> dict[str, _Place]:
        if group.name not in self._places:
            self._places[group.name] = {
                name: place
                for unit in self.units(group)
                for number, matrix in enumerate(unit.matrices)
                for name, place in _rows(unit, number, matrix)
            }
        return self._places[group.name]


def _rows(unit: Unit, number: int, matrix: tuple[Linear, ...]) -> Iterator[tuple[str, _Place]]:
    first = 0
    for linear in matrix:
        yield linear.name, _Place(unit, number, first, first + linear.out_features)
        first += linear.out_features
