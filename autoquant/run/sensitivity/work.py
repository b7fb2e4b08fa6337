"""What measuring takes besides time: passes over the weights, what is brought for them, cores.

These numbers say where the time of a search goes whose weights are streamed.
"""

import time
from dataclasses import dataclass
from typing import Any, Self

from autoquant.measure.scorer import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of one process."""

    passes: float = 0.0
    """Over the blocks of the model, those that go through a part of them as that part."""
    blocks_brought: int = 0
    """To the device, from the host's memory or the disk."""
    bytes_brought: int = 0
    """Of these blocks, as they are stored there."""
    state_bytes_moved: int = 0
    """Of states between blocks, from the device to the host's memory or back."""
    weights_encoded: int = 0
    """How often codes of a weight, or of a product of all experts, were made."""
    cpu_seconds: float = 0.0
    """Of all threads of the process, whatever else the machine runs."""

    @classmethod
    def of(cls, scorer: Scorer | None) -> Self:
        """All that this process has taken so far, before it has a scorer or with it."""
        if scorer is None:
            return cls(cpu_seconds=time.process_time())
        quantized = scorer.quantized
        brought = quantized.brought
        return cls(
            passes=scorer.trunk.opened / scorer.trunk.stages,
            blocks_brought=brought.blocks,
            bytes_brought=brought.bytes,
            state_bytes_moved=scorer.room.moved_bytes,
            weights_encoded=quantized.book.encoded,
            cpu_seconds=time.process_time(),
        )

    def since(self, before: Self) -> "Work":
        """What was taken after `before`."""
        own, earlier = self.to_dict(), before.to_dict()
        return Work(**{name: value - earlier[name] for name, value in own.items()})

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "passes": self.passes,
            "blocks_brought": self.blocks_brought,
            "bytes_brought": self.bytes_brought,
            "state_bytes_moved": self.state_bytes_moved,
            "weights_encoded": self.weights_encoded,
            "cpu_seconds": self.cpu_seconds,
        }
