"""What a search will take of this machine, before a weight is read."""

from dataclasses import dataclass
from typing import Any, Self

from autoquant.codes.held import Weights
from autoquant.decimals import gigabytes
from autoquant.model.loading import choose_device, sizes_of
from autoquant.model.streaming.placement import Sizes, choose
from autoquant.run.config import PlanConfig
from autoquant.source.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Where weights go, and what that takes: what the search itself goes by when it loads them."""

    device: str
    weights: Weights
    sizes: Sizes
    device_bytes: int
    """Of the device's memory, work beside the weights included."""
    host_bytes: int
    """Of the host's; beside a CPU that is the device's."""

    @classmethod
    def of(cls, config: PlanConfig, source: Source) -> Self:
        """The forecast of a search of this model.

        Raises:
            OutOfMemory: what is asked for does not fit, or nothing does; it says what would.
            SourceError: an architecture that transformers does not know.
            ConfigError: no such device.
        """
        device = choose_device(config.device)
        sizes = sizes_of(source, trust_remote_code=config.trust_remote_code)
        weights, _ = choose(sizes, device, config.allowance)
        return cls(
            device=str(device),
            weights=weights,
            sizes=sizes,
            device_bytes=sizes.on_device(weights),
            host_bytes=sizes.on_host(weights, is_gpu=device.type == "cuda"),
        )

    def in_words(self) -> str:
        """One line."""
        beside = f", {gigabytes(self.host_bytes)} of the host" if self.device != "cpu" else ""
        taken = f"{gigabytes(self.device_bytes)} of {self.device}{beside}"
        if self.weights is Weights.RESIDENT:
            return f"{taken}: all weights on the device"
        return f"{taken}: blocks of {gigabytes(max(self.sizes.blocks))} from the {self.weights}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "device": self.device,
            "weights": str(self.weights),
            "weight_bytes": self.sizes.all,
            "largest_block_bytes": max(self.sizes.blocks, default=0),
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
        }
