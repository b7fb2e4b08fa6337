"""How probes add up: correlations of the output changes of every pair of (group, choice).

Shapes: P probes, S numbers in a probe's sketch of one batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoquant.arrays import Floats
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
        """Keep a probe's sketch, float32 [S]."""
        sketches = self._open(batch, values.numel())
        sketches[self._row[key]] = values.cpu().numpy()
        sketches.flush()

    def finish(self, batch: int) -> None:
        """Replace the sketches of a batch, all of them there, by their inner products."""
        path = self._sketches(batch)
        if not path.exists():
            return
        sketches = np.load(path)
        with replacing(self._products(batch)) as file:
            np.save(file, np.asarray(sketches @ sketches.T, dtype=np.float64))
        path.unlink()

    def interactions(self, batches: int) -> Interactions:
        """Of the batches that have inner products."""
        total = np.zeros((len(self._keys), len(self._keys)))
        for batch in filter(self.is_finished, range(batches)):
            total += np.load(self._products(batch))
        return Interactions.of_products(self._keys, total)

    def _open(self, batch: int, size: int) -> Any:
        path = self._sketches(batch)
        if path.exists():
            return np.lib.format.open_memmap(path, mode="r+")
        shape, new = (len(self._keys), size), path.with_suffix(".new")
        np.lib.format.open_memmap(new, mode="w+", dtype=np.float32, shape=shape).flush()
        new.replace(path)
        return np.lib.format.open_memmap(path, mode="r+")

    def _sketches(self, batch: int) -> Path:
        return self._folder / f"sketches-{batch}.npy"

    def _products(self, batch: int) -> Path:
        return self._folder / f"products-{batch}.npy"
