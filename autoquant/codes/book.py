"""The one way to a quantized weight.

What is scored, exported and verified is what a `CodeBook` gives: codes are encoded by the format
from the weight and its statistics, and decoded by the format. Codes depend on the source model
alone, never on the rest of an assignment.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from autoquant.codes.cache import CodeCache, LinearCodes
from autoquant.codes.encoder import Encoder, rows_of
from autoquant.codes.kept import Kept
from autoquant.codes.statistics import DriftStatistics, StatisticsStore
from autoquant.codes.weights import Unit, WeightSource
from autoquant.errors import SourceError
from autoquant.formats import REFIT, Choice
from autoquant.formats.packed import Packed
from autoquant.plan.linears import LayerGroup, Linear

Key = tuple[str, Choice]
"""The name of a unit or of a group, and a choice."""


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
            case. What costs little is encoded again where memory does not hold it.
        recent_bytes: for the last ones asked for beyond that.
        cache: on disk, for codes that cost more to make than to read; None keeps none.
        statistics: for choices that need moments of the inputs.
    """

    def __init__(
        self,
        weights: WeightSource,
        *,
        memory_bytes: int,
        recent_bytes: int = 0,
        cache: CodeCache | None = None,
        statistics: StatisticsStore | None = None,
    ) -> None:
        self.weights = weights
        self.cache = cache
        self.polish: str | None = None
        """What names the assignment that refitted codes belong to."""
        self._encoder = Encoder(weights, statistics)
        self._packed: Kept[Key, Packed] = Kept(memory_bytes, recent_bytes)
        self._places: dict[str, dict[str, _Place]] = {}
        self._made: tuple[str, Choice, LinearCodes] | None = None
        """The costly codes that were made last: units ask for them in turn."""
        self._plain: dict[Key, Mapping[str, str]] = {}

    @property
    def encoded(self) -> int:
        """Weights of which codes were made so far."""
        return self._encoder.encoded

    def of_other_weights(self, weights: WeightSource) -> Self:
        """A book over the same weights from elsewhere, which keeps nothing in memory but the
        magnitudes that are known already.
        """
        other = type(self)(weights, memory_bytes=0, cache=self.cache)
        other._encoder = self._encoder.of_other_weights(weights)
        other.polish = self.polish
        return other

    def use_polish(self, key: str) -> None:
        """Give the refitted codes of another assignment from now on."""
        if key != self.polish:
            self.polish, self._made = key, None
            self._packed.drop(lambda own: own[1].rounding == REFIT)
            for own in [own for own in self._plain if own[1].rounding == REFIT]:
                del self._plain[own]

    def refit(
        self, group: LayerGroup, choice: Choice, statistics: DriftStatistics, *, is_whole: bool
    ) -> None:
        """Make refitted codes of a group of the assignment in use.

        Args:
            group: its units that `statistics` knows are made. The others keep what was made right
                before, or have plain codes until they are made.
            choice: with the rounding `refit`.
            statistics: of the inputs that what is quantized before gives.
            is_whole: whether all have been made, and are kept on disk.
        """
        choice, made = choice.of_weight, None
        if self._made is not None and self._made[:2] == (group.name, choice):
            made = self._made[2]
        found = self._encoder.group(group, choice, statistics, made)
        self._made = group.name, choice, found
        names = {unit.name for unit in self.units(group)}
        self._packed.drop(lambda own: own[0] in names and own[1] == choice)
        if is_whole:
            self._keep(group, choice, found)

    def unit(self, group: LayerGroup, unit: Unit, choice: Choice) -> Packed:
        """The codes of one unit of a group; the same whatever the choice's input.

        Raises:
            SourceError: the weight holds NaN or Inf, or it or its statistics cannot be read.
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

    def plain(self, group: LayerGroup, choice: Choice) -> Mapping[str, str]:
        """The linears of a group that have plain rounding where the choice has another, and why."""
        choice = choice.of_weight
        if not choice.format.is_costly(choice):
            return {}
        if (group.name, choice) not in self._plain:
            self._costly(group, choice, [group.linears[0].name])
        return self._plain[group.name, choice]

    def has(self, group: LayerGroup, choice: Choice) -> bool:
        """Whether the codes of a group are there, or made in less time than they are read."""
        choice = choice.of_weight
        if not choice.format.is_costly(choice):
            return True
        names = [linear.name for linear in group.linears]
        return self._kept(group, choice, names) is not None

    def give(self, group: LayerGroup, choice: Choice, linears: Mapping[str, Packed]) -> None:
        """Use these codes of a group from now on, such as those that a checkpoint stores.

        Args:
            group: all of whose linears are given.
            choice: under which they are used.
            linears: codes [N, ...] by the linear's name.
        """
        for unit in self.units(group):
            self._packed.put((unit.name, choice.of_weight), _as_unit(unit, linears))

    def units(self, group: LayerGroup) -> tuple[Unit, ...]:
        """How the group's weights are held."""
        return self._encoder.units(group)

    def _read_or_encode(self, group: LayerGroup, unit: Unit, choice: Choice) -> Packed:
        if not choice.format.is_costly(choice):
            return self._encoder.unit(group, unit, choice)
        names = [linear.name for matrix in unit.matrices for linear in matrix]
        packed = _as_unit(unit, self._costly(group, choice, names).packed)
        return packed.to(self.weights.device(unit))

    def _costly(self, group: LayerGroup, choice: Choice, names: Iterable[str]) -> LinearCodes:
        """Codes of these linears of a group, and perhaps of others: read, or made and kept."""
        found = self._kept(group, choice, names)
        if found is None and choice.rounding == REFIT:
            raise SourceError(
                f"the refitted codes of {group.name} are not there: the polish of a search made "
                "them, for one assignment.",
                fix="name the checkpoint instead of the assignment, or repeat the search.",
            )
        if found is None:
            found = self._encoder.group(group, choice)
            self._keep(group, choice, found)
        self._plain[group.name, choice] = found.plain
        return found

    def _keep(self, group: LayerGroup, choice: Choice, found: LinearCodes) -> None:
        self._made = group.name, choice, found
        digest = self._digest(group, choice)
        if self.cache is not None and digest is not None:
            self.cache.write(group.name, choice, digest, found)

    def _digest(self, group: LayerGroup, choice: Choice) -> str | None:
        """Of what codes rest on besides the weight and the choice; None where that is missing."""
        if choice.rounding == REFIT:
            return self.polish
        return self._encoder.digest(group, choice)

    def _kept(self, group: LayerGroup, choice: Choice, names: Iterable[str]) -> LinearCodes | None:
        if self._made is not None and self._made[:2] == (group.name, choice):
            return self._made[2]
        digest = self._digest(group, choice)
        if self.cache is None or digest is None:
            return None
        return self.cache.read(group.name, choice, digest, names)

    def _places_of(self, group: LayerGroup) -> dict[str, _Place]:
        if group.name not in self._places:
            self._places[group.name] = {
                linear.name: _Place(unit, number, first, last)
                for unit in self.units(group)
                for number, matrix in enumerate(unit.matrices)
                for linear, first, last in rows_of(matrix)
            }
        return self._places[group.name]


def _as_unit(unit: Unit, linears: Mapping[str, Packed]) -> Packed:
    """The codes of linears as the source holds them."""
    joined = [Packed.joined([linears[own.name] for own in matrix]) for matrix in unit.matrices]
    return Packed.stacked(joined) if unit.is_stack else joined[0]
