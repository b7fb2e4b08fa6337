"""How long a search takes on this machine: measurements of one block, and what is counted."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from autoquant.codes.held import Weights
from autoquant.plan.plan import Plan
from autoquant.report.words import duration
from autoquant.run.config import PlanConfig
from autoquant.run.machines.bench import Bench, BlockSeconds
from autoquant.run.machines.forecast import Forecast
from autoquant.run.machines.passes import Passes

NOT_TIMED = frozenset({"polish"})
"""What one block by itself says nothing of: the polish refits weights to what others changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a search takes here."""

    device: str
    threads: int
    tokens: int
    """Of the batch that was measured."""
    layer: int
    """Of the block that was measured."""
    measured: BlockSeconds
    took: float
    """Seconds of the measurement itself."""
    parts: Mapping[str, float]
    """Seconds of each part of the search."""
    left_out: tuple[str, ...]
    """Parts that are not timed."""

    @classmethod
    def of(
        cls,
        config: PlanConfig,
        plan: Plan,
        forecast: Forecast,
        clock: Callable[[], float] = time.monotonic,
    ) -> "Timing":
        """Measure one block, and multiply by what the forecast counts.

        Args:
            config: of the search.
            plan: what it names, opened.
            forecast: where weights will be, and how often what is done.
            clock: seconds; those of the processor say more where other programs run.

        Raises:
            SourceError: the model's blocks cannot be run one at a time.
            OutOfMemory: a block does not fit.
        """
        started = clock()
        bench = Bench(config, plan, forecast, clock)
        measured = bench.measure()
        parts = {
            name: seconds_of(part, measured, bench.blocks, forecast.weights)
            for name, part in forecast.parts.items()
            if name not in NOT_TIMED
        }
        whole = bench.blocks * measured.read
        parts["load"] += measured.opened
        if forecast.weights in (Weights.RESIDENT, Weights.HOST, Weights.SHARDED):
            parts["load"] += whole
        if config.budget is not None:
            size = plan.limit(config.budget).at_most
            encoded = bench.blocks * measured.encoded
            parts["export"] = 3 * whole + 2 * encoded + size * measured.written_byte
        return cls(
            device=str(bench.device),
            threads=torch.get_num_threads(),
            tokens=bench.tokens.numel(),
            layer=bench.layer,
            measured=measured,
            took=clock() - started,
            parts=parts,
            left_out=tuple(name for name in forecast.parts if name in NOT_TIMED),
        )

    @property
    def total(self) -> float:
        """Seconds of the whole search."""
        return sum(self.parts.values())

    def in_words(self) -> str:
        """One line."""
        parts = (f"{name} {duration(seconds)}" for name, seconds in self.parts.items())
        without = f"; without the {' and the '.join(self.left_out)}" if self.left_out else ""
        return f"about {duration(self.total)}: {', '.join(parts)}{without}"

    def measured_in_words(self) -> str:
        """One line."""
        cores = f", {self.threads} threads" if self.device == "cpu" else ""
        return (
            f"block {self.layer} with {self.tokens:,} tokens on {self.device}{cores}, in "
            f"{duration(self.took)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"seconds": {**self.parts, "total": self.total}} | {
            name: value for name, value in asdict(self).items() if name != "parts"
        }


def seconds_of(part: Passes, unit: BlockSeconds, blocks: float, weights: Weights) -> float:
    """Of a part of a search: blocks come while others compute, so that the longer of both counts.

    Args:
        part: what it does.
        unit: of one block.
        blocks: how many of the size of the measured one make the model.
        weights: where they are.
    """
    does = part.computed
    inside = (
        does.observed * unit.observed
        + does.forwards * unit.forward
        + does.candidates * unit.candidate
        + does.backwards * unit.backward
        + does.summed * unit.summed
        + does.weighed * unit.weighed
        + does.encoded * unit.encoded
        + does.fitted * unit.fitted
    )
    behind = (
        (does.backwards + does.weighed) * unit.pulled
        + does.referred * unit.referred
        + does.compared * unit.compared
        + does.probed * unit.probed
        + does.scored * unit.scored
    )
    if weights is Weights.RESIDENT:
        return blocks * inside + behind
    passes = part.passes if part.usual is None else part.usual
    return max(blocks * inside + behind, passes * blocks * unit.brought)
