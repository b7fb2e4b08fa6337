"""How probes add up: correlations of the output changes of every pair of (group, choice).

Shapes: P probes, S numbers in a probe's sketch of one batch.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from autoquant.arrays import Floats
from autoquant.errors import SourceError
from autoquant.files import replacing
from autoquant.formats import Choice
from autoquant.measure.sketch import LogitSketch

Key = tuple[str, Choice]


@dataclass(frozen=True)
class Interactions:
    """Correlation of the whitened logit changes of each pair of probes."""

    keys: tuple[Key, ...]
    correlation: Floats
    """[P, P], symmetric, in [-1, 1]; zero where a probe has no sketch, or none that is finite."""

    def of(self, keys: Sequence[Key]) -> Floats:
        """Correlations [N, N] of `keys`; zero for what was never sketched."""
        places = {key: i for i, key in enumerate(self.keys)}
        index = np.array([places.get(key, -1) for key in keys], dtype=int)
        padded = np.pad(self.correlation, ((0, 1), (0, 1)))
        return np.asarray(padded[np.ix_(index, index)])

    @classmethod
    def of_products(cls, keys: Sequence[Key], products: Floats) -> "Interactions":
        """From inner products [P, P] of the sketches, summed over batches."""
        finite = np.isfinite(np.diag(products))
        products = np.where(finite[:, None] & finite, products, 0.0)
        lengths = np.sqrt(np.diag(products))
        scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0.0)
        return cls(tuple(keys), np.clip(products * np.outer(scale, scale), -1.0, 1.0))


class SketchBook:
    """Sketches of one batch at a time, and inner products of finished batches, in a folder.

    What a killed process had sketched of a batch is found again by the next one.

    Args:
        folder: created where absent.
        keys: the probes, in an order that stays.
        tokens: most tokens of a batch.
    """

    def __init__(self, folder: Path, keys: Sequence[Key], tokens: int) -> None:
        self.sketch = LogitSketch.within_memory(probes=len(keys), tokens=tokens)
        self._folder, self._keys = folder, tuple(keys)
        self._row = {key: row for row, key in enumerate(keys)}
        folder.mkdir(exist_ok=True)

    def is_finished(self, batch: int) -> bool:
        return self._products(batch).exists()

    def put(self, batch: int, key: Key, values: torch.Tensor) -> None:
        """Keep a probe's sketch, float32 [S]; it is on the disk when this returns.

        It is written, not mapped: a full disk is an error of a write, and the end of a process that
        touches a mapped file's hole.

        Raises:
            OSError: it cannot be written.
        """
        path, row = self._sketches(batch), values.cpu().numpy().tobytes()
        path.touch()
        with path.open("r+b") as file:
            file.seek(self._row[key] * len(row))
            file.write(row)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, batch: int) -> None:
        """Replace the sketches of a batch, all of them there, by their inner products.

        Raises:
            SourceError: the file is damaged.
        """
        path = self._sketches(batch)
        if not path.exists():
            return
        numbers = np.fromfile(path, dtype=np.float32)
        if numbers.size % len(self._keys):
            raise _damaged(path)
        sketches = numbers.reshape(len(self._keys), -1)
        stored = io.BytesIO()  # into a file, NumPy's own writing hides why it failed
        np.save(stored, np.asarray(sketches @ sketches.T, dtype=np.float64))
        with replacing(self._products(batch)) as file:
            file.write(stored.getbuffer())
        path.unlink()

    def interactions(self, batches: int) -> Interactions:
        """Of the batches that have inner products.

        Raises:
            SourceError: a file of them is damaged.
        """
        total = np.zeros((len(self._keys), len(self._keys)))
        for batch in filter(self.is_finished, range(batches)):
            total += self._read_products(batch)
        return Interactions.of_products(self._keys, total)

    def _read_products(self, batch: int) -> Floats:
        path = self._products(batch)
        try:
            products: Floats = np.load(path)
        except (ValueError, EOFError) as error:
            raise _damaged(path) from error
        if products.shape != (len(self._keys), len(self._keys)):
            raise _damaged(path)
        return products

    def _sketches(self, batch: int) -> Path:
        return self._folder / f"sketches-{batch}.f32"

    def _products(self, batch: int) -> Path:
        return self._folder / f"products-{batch}.npy"


def _damaged(path: Path) -> SourceError:
    return SourceError(
        f"{path} is damaged.",
        fix="start anew with --fresh (the earlier run is set aside), or restore the file.",
    )
