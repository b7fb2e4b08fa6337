"""What measuring takes besides time: passes over the weights, what is brought for them, cores.

These numbers say where the time of a search goes whose weights are streamed.
"""

import time
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from autoquant.measure.scorer import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of one process."""

    stages_passed: int = 0
    """Parts of the model that forwards went through; a pass goes through all of them."""
    blocks_brought: int = 0
    """To the device, from the host's memory or the disk."""
    bytes_brought: int = 0
    """Of these blocks, as they are stored there."""
    seconds_waited: float = 0.0
    """In which a block was needed that had not come."""
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
            stages_passed=scorer.trunk.opened,
            blocks_brought=brought.blocks,
            bytes_brought=brought.bytes,
            seconds_waited=brought.waited,
            state_bytes_moved=scorer.room.moved_bytes,
            weights_encoded=quantized.book.encoded,
            cpu_seconds=time.process_time(),
        )

    def since(self, before: Self) -> "Work":
        """What was taken after `before`."""
        names = (field.name for field in fields(self))
        return Work(**{name: getattr(self, name) - getattr(before, name) for name in names})

    def to_dict(self, stages: int) -> dict[str, Any]:
        """As JSON types; passes over the model, which has so many stages."""
        taken = asdict(self)
        return {"passes": taken.pop("stages_passed") / stages} | taken
