"""Second moments of inputs: on disk, one file for each block of the model, or of one in memory."""

import json
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from torch import Tensor

from autoquant.codes.row_weights import RowWeights
from autoquant.codes.tensor_files import (
    SUFFIX,
    TensorFile,
    digest_of,
    names_in,
    read_tensors,
    write_tensors,
)
from autoquant.codes.weights import Unit
from autoquant.errors import SourceError
from autoquant.formats.moments import Moments
from autoquant.source.names import ROUTED_EXPERT

_WEIGHED, _ALIKE = "weighed", "why alike"
"""What the file of rows says besides: the input sets whose rows were weighed, also those that no
gradient reaches, and why all rows count alike."""


class InputStatistics(Protocol):
    """What is known of the inputs of units."""

    def moments(self, unit: Unit) -> Moments:
        """Of every expert of a product, or of one weight or expert."""

    def drift(self, unit: Unit) -> Moments | None:
        """Of the same inputs from those of the BF16 model, where they differ."""


@dataclass(frozen=True, slots=True)
class DriftStatistics:
    """Of inputs behind quantized blocks, by input set; in memory."""

    own: Mapping[str, Moments]
    drifts: Mapping[str, Moments]

    def knows(self, unit: Unit) -> bool:
        """Whether there are some of the inputs of a unit."""
        return _set_of(unit) in self.own

    def moments(self, unit: Unit) -> Moments:
        """Of the inputs themselves."""
        return _of_unit(self.own[_set_of(unit)], unit)

    def drift(self, unit: Unit) -> Moments:
        """Of those of the BF16 model less these, with these."""
        return _of_unit(self.drifts[_set_of(unit)], unit)


class StatisticsStore:
    """A folder of second moments.

    Args:
        folder: created when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[tuple[int | None, str], Moments] = {}
        """Of one block."""
        self._owned: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def temporary(cls) -> Self:
        """A store whose folder goes with it."""
        folder = tempfile.TemporaryDirectory(prefix="autoquant-statistics-")
        store = cls(Path(folder.name))
        store._owned = folder
        return store

    def write(self, layer: int | None, moments: Mapping[str, Moments]) -> None:
        """Keep the moments of a block's input sets, or of those outside of all blocks, beside what
        is kept of others.
        """
        path, entries = self._path(layer), {name: _parts(own) for name, own in moments.items()}
        others = read_tensors(path, [name for name in names_in(path) if name not in moments])
        before = {} if others is None else others.entries
        write_tensors(path, TensorFile({**before, **entries}).content())
        self._read.clear()

    def remove(self, layers: Iterable[int | None]) -> None:
        """Drop the moments of some blocks."""
        for layer in layers:
            self._path(layer).unlink(missing_ok=True)
        self._read.clear()

    def write_rows(self, weights: Mapping[str, RowWeights], sets: Iterable[str]) -> None:
        """Keep how much the rows of input sets count, beside what is kept of others.

        Args:
            weights: by input set.
            sets: all that were weighed; rows of those without weights count alike.
        """
        path = self._path_of_rows
        before = read_tensors(path, names_in(path)) or TensorFile({})
        entries = {name: {"values": own.values, "rows": own.rows} for name, own in weights.items()}
        facts = {_WEIGHED: json.dumps(sorted({*_weighed(before), *sets}))}
        write_tensors(path, TensorFile({**before.entries, **entries}, facts).content())

    def count_alike(self, why: str) -> None:
        """Keep that the rows of all input sets count alike."""
        write_tensors(self._path_of_rows, TensorFile({}, {_ALIKE: why}).content())

    def rows(self, sets: Collection[str]) -> dict[str, RowWeights] | None:
        """The weights of the rows of those of these input sets that have some; None where one was
        not weighed.
        """
        if self.why_alike() is not None:
            return {}
        path = self._path_of_rows
        file = read_tensors(path, [name for name in names_in(path) if name in sets])
        if file is None or not {*sets} <= _weighed(file):
            return None
        return {name: RowWeights(**own) for name, own in file.entries.items()}

    def unreached(self, sets: Collection[str]) -> list[str]:
        """Those of these input sets that were weighed, and of which gradients say nothing."""
        said = read_tensors(self._path_of_rows, ())
        weighed = set() if said is None else _weighed(said)
        return sorted((weighed & {*sets}) - {*names_in(self._path_of_rows)})

    def why_alike(self) -> str | None:
        """Why all rows count alike in the moments; None where they do not, or nothing is known."""
        said = read_tensors(self._path_of_rows, ())
        return None if said is None else said.facts.get(_ALIKE)

    def has(self, layer: int | None, sets: Iterable[str]) -> bool:
        """Whether the moments of these input sets of a block are there and whole."""
        return read_tensors(self._path(layer), sets) is not None

    def digest(self, layer: int | None, sets: Iterable[str]) -> str | None:
        """Of the moments of these input sets of a block; None where they are not there."""
        return digest_of(self._path(layer), sets)

    def moments(self, unit: Unit) -> Moments:
        """Of the inputs of a unit: of every expert of a product, or of one weight or expert.

        Raises:
            SourceError: they are not there, or damaged.
        """
        return _of_unit(self._of_set(unit.layer, _set_of(unit)), unit)

    def drift(self, unit: Unit) -> None:
        """These inputs are the BF16 model's."""

    def _of_set(self, layer: int | None, name: str) -> Moments:
        if (layer, name) not in self._read:
            file = read_tensors(self._path(layer), [name])
            if file is None:
                raise self._missing(layer)
            if any(other != layer for other, _ in self._read):
                self._read.clear()
            self._read[layer, name] = Moments(**file.entries[name])
        return self._read[layer, name]

    @property
    def _path_of_rows(self) -> Path:
        return self.folder / f"rows{SUFFIX}"

    def _path(self, layer: int | None) -> Path:
        return self.folder / f"{'rest' if layer is None else layer}{SUFFIX}"

    def _missing(self, layer: int | None) -> SourceError:
        return SourceError(
            f"{self._path(layer)} holds no whole statistics of the inputs, which compensated "
            "rounding and weighted block scales rest on.",
            fix="calibrate again: repeat the command without --calibrated, or remove the file.",
        )


def _weighed(rows: TensorFile) -> set[str]:
    """The input sets whose rows were weighed."""
    return {*json.loads(rows.facts.get(_WEIGHED, "[]"))}


def _set_of(unit: Unit) -> str:
    return unit.matrices[0][0].input_scale_set


def _of_unit(found: Moments, unit: Unit) -> Moments:
    """Of an input set what a unit reads."""
    expert = ROUTED_EXPERT.fullmatch(unit.matrices[0][0].name)
    if unit.is_stack or expert is None or found.layer_sums is None:
        return found
    index = int(expert["index"])
    return found.of(slice(index, index + 1))


def _parts(moments: Moments) -> dict[str, Tensor]:
    found = {"sums": moments.sums, "tokens": moments.tokens}
    if moments.layer_sums is not None and moments.layer_tokens is not None:
        found |= {"layer_sums": moments.layer_sums, "layer_tokens": moments.layer_tokens}
    return found
