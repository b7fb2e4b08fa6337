"""Second moments of inputs: on disk, one file for each block of the model, or of one in memory."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from torch import Tensor

from autoquant.codes.row_weights import RowWeights
from autoquant.codes.tensor_files import (
    SUFFIX,
    TensorFile,
    digest_of,
    read_tensors,
    write_tensors,
)
from autoquant.codes.weights import Unit
from autoquant.errors import SourceError
from autoquant.formats.moments import Moments
from autoquant.source.names import ROUTED_EXPERT

_SETS, _WHY = "sets", "why alike"
"""What the file of rows says besides."""


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
        """Keep the moments of a block's input sets, or of those outside of all blocks."""
        entries = {name: _parts(own) for name, own in moments.items()}
        write_tensors(self._path(layer), TensorFile(entries).content())
        self._read.clear()

    def write_rows(self, weights: Mapping[str, RowWeights], why_alike: str | None) -> None:
        """Keep how much the rows of input sets count, of all that have weights.

        Args:
            weights: by input set.
            why_alike: why there are none, where all rows count alike.
        """
        entries = {name: {"values": own.values, "rows": own.rows} for name, own in weights.items()}
        facts = {_SETS: json.dumps(sorted(weights))} | ({_WHY: why_alike} if why_alike else {})
        write_tensors(self._path_of_rows, TensorFile(entries, facts).content())

    def rows(self) -> dict[str, RowWeights] | None:
        """The weights of rows by input set; None where they are not there."""
        said = read_tensors(self._path_of_rows, ())
        if said is None:
            return None
        file = read_tensors(self._path_of_rows, json.loads(said.facts[_SETS]))
        return None if file is None else {n: RowWeights(**own) for n, own in file.entries.items()}

    def why_alike(self) -> str | None:
        """Why all rows count alike in the moments; None where they do not, or nothing is known."""
        said = read_tensors(self._path_of_rows, ())
        return None if said is None else said.facts.get(_WHY)

    def has(self, layer: int | None, sets: Iterable[str]) -> bool:
        """Whether the moments of these input sets of a block are there and whole."""
        return read_tensors(self._path(layer), sets) is not None

    def digest(self, layer: int | None) -> str | None:
        """Of a block's moments; None where they are not there."""
        return digest_of(self._path(layer))

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
