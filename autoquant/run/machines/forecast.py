"""What a search will take of this machine, before a weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from autoquant.codes.held import Weights
from autoquant.codes.statistics_size import groups_with_moments
from autoquant.decimals import gigabytes
from autoquant.formats import BF16
from autoquant.model.loading import choose_device, sizes_of
from autoquant.model.streaming.kept import Gpus
from autoquant.model.streaming.placement import Sizes, choose, processes_here
from autoquant.model.streaming.work import STATE_BYTES
from autoquant.plan.plan import Plan
from autoquant.run.config import PlanConfig
from autoquant.run.cpu_work import shortened, work_bytes
from autoquant.run.machines.passes import (
    Passes,
    Streaming,
    forecast_passes,
    states_of_gradients,
)
from autoquant.source.headers import DTYPE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Where weights go, and what that takes: what the search itself goes by when it loads them."""

    device: str
    weights: Weights
    sizes: Sizes
    gpus: int
    """That keep the weights together, where they are sharded."""
    device_bytes: int
    """Most of the device's memory, with work beside the weights, and codes that are kept."""
    host_bytes: int
    """Most of the host's; beside a CPU that is the device's."""
    parts: Mapping[str, Passes]
    """Of the search, in their order."""

    @classmethod
    def of(cls, config: PlanConfig, plan: Plan) -> Self:
        """The forecast of a search with these settings.

        Raises:
            OutOfMemory: what is asked for does not fit, or nothing does; it says what would.
            SourceError: an architecture that transformers does not know.
            ConfigError: no such device, or one where weights are to be on several.
        """
        device, config = choose_device(config.device), shortened(config, plan.source)
        is_gpu = device.type == "cuda"
        choices = plan.options.choices
        open_groups = [group for group in plan.groups if choices[group.name] != (BF16,)]
        sizes = replace(
            sizes_of(plan.source, trust_remote_code=config.trust_remote_code),
            work=work_bytes(config, plan.source, open_groups),
        )
        gpus = _gpus(device, config.weights)
        weights, left = choose(sizes, device, config.allowance, gpus=gpus)
        streaming = Streaming(
            stages=len(sizes.blocks),
            width=sizes.width,
            state_bytes=max(left.host, STATE_BYTES + left.device),
            is_streamed=weights is not Weights.RESIDENT,
        )
        kept = left.kept.most(*_codes(plan))
        if not is_gpu:
            is_weighed = bool(groups_with_moments(choices, open_groups))
            states = states_of_gradients(config, streaming, is_weighed=is_weighed)
            kept += min(left.host, states)
        return cls(
            device=str(device),
            weights=weights,
            sizes=sizes,
            gpus=gpus.count,
            device_bytes=sizes.on_device(weights, is_gpu=is_gpu, gpus=gpus.count) + kept,
            host_bytes=sizes.on_host(weights, is_gpu=is_gpu) + (0 if is_gpu else kept),
            parts=forecast_passes(config, plan, streaming),
        )

    @property
    def passes(self) -> Mapping[str, Passes]:
        """Over weights that are streamed, by part of the search; empty where they are resident."""
        return {} if self.weights is Weights.RESIDENT else self.parts

    @property
    def all_passes(self) -> int:
        """Of the whole search, at most."""
        return sum(part.passes for part in self.passes.values())

    @property
    def brought_bytes(self) -> int:
        """What is brought to a device in these passes, at most."""
        block_bytes = sum(self.sizes.blocks)
        if self.weights is Weights.DISK:
            block_bytes = self.sizes.stored
        elif self.weights is Weights.SHARDED:
            block_bytes -= block_bytes // self.gpus
        return self.all_passes * block_bytes

    def in_words(self) -> str:
        """One line."""
        beside = f", {gigabytes(self.host_bytes)} of the host" if self.device != "cpu" else ""
        is_sharded = self.weights is Weights.SHARDED
        device = f"each of {self.gpus} GPUs" if is_sharded else self.device
        taken = f"{gigabytes(self.device_bytes)} of {device}{beside}"
        if self.weights is Weights.RESIDENT:
            return f"{taken}: all weights on the device"
        if is_sharded:
            return f"{taken}: blocks of {gigabytes(max(self.sizes.blocks))} from all of them"
        return f"{taken}: blocks of {gigabytes(max(self.sizes.blocks))} from the {self.weights}"

    def passes_in_words(self) -> str:
        """One line; empty where weights are resident."""
        if not self.passes:
            return ""
        parts = (
            f"{name} {'up to ' if part.is_most else ''}{part.passes}"
            for name, part in self.passes.items()
        )
        return (
            f"up to {self.all_passes} over the weights, {gigabytes(self.brought_bytes)}: "
            f"{', '.join(parts)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "device": self.device,
            "weights": str(self.weights),
            "weight_bytes": self.sizes.all,
            "gpus": self.gpus,
            "largest_block_bytes": max(self.sizes.blocks, default=0),
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "passes": {
                name: {"passes": part.passes, "is_most": part.is_most}
                for name, part in self.passes.items()
            },
            "brought_bytes": self.brought_bytes,
        }


def _gpus(device: torch.device, asked: Weights) -> Gpus:
    """Those of the processes that a launcher has started; all of the machine if it has not, and
    weights are to be on them.
    """
    if device.type != "cuda":
        return Gpus(1, f"{device} is no GPU")
    count = processes_here()
    if asked is Weights.SHARDED and count == 1:
        return Gpus(torch.cuda.device_count(), "this one has one")
    return Gpus(count)


def _codes(plan: Plan) -> tuple[int, int]:
    """Bytes of the codes of every choice, and of the weights in BF16 that they stand for."""
    packed = decoded = 0
    for group in plan.groups:
        for choice in plan.options.choices[group.name]:
            if choice != BF16:
                packed += plan.accounting.group_bytes(group.name, choice)
                decoded += group.elements * DTYPE_BYTES["BF16"]
    return packed, decoded
