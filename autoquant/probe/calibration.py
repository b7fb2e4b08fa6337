"""One pass in BF16 over the calibration split: input ranges and expert coverage."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from autoquant.data.tokens import Split
from autoquant.errors import SourceError
from autoquant.groups import LayerGroup
from autoquant.kv_cache import KvRange
from autoquant.model.inputs import InputScales, fill_unseen
from autoquant.rundir import read_json
from autoquant.scoring.scorer import Scorer

_OF_A_SEARCH = "pass the calibration.json of a search of this model, or leave it out to calibrate."


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the calibration split told about the model."""

    input_amax: dict[str, float]
    """Largest input magnitude of each input scale set, complete."""
    unseen: tuple[str, ...]
    """Input sets that no calibration token reached; they took their block's largest range."""
    expert_tokens: dict[str, list[int]]
    """Tokens routed to each expert of each block."""
    kv_ranges: dict[str, KvRange] = field(default_factory=dict)
    """Largest keys and values of each attention module; empty where the cache stays in BF16."""

    def scales(self) -> dict[str, InputScales]:
        """Static input scales, as they are exported."""
        return {name: InputScales.of_amax(amax) for name, amax in self.input_amax.items()}

    def idle_experts(self) -> dict[str, int]:
        """Blocks with experts that saw no token, and how many."""
        idle = {block: tokens.count(0) for block, tokens in self.expert_tokens.items()}
        return {block: count for block, count in idle.items() if count}

    def to_dict(self) -> dict[str, Any]:
        return {
            "input_amax": self.input_amax,
            "unseen": list(self.unseen),
            "expert_tokens": self.expert_tokens,
        } | ({"kv_amax": _as_lists(self.kv_ranges)} if self.kv_ranges else {})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(
            input_amax=data["input_amax"],
            unseen=tuple(data["unseen"]),
            expert_tokens=data["expert_tokens"],
            kv_ranges={name: KvRange(*pair) for name, pair in data.get("kv_amax", {}).items()},
        )


def calibrate(scorer: Scorer, split: Split, advance: Callable[[], None]) -> Calibration:
    """Observe every batch of `split`.

    Args:
        scorer: all groups in BF16.
        split: the calibration tokens.
        advance: called after each batch.

    Raises:
        SourceError: NaN or Inf at some linear's input, which is named.
    """
    with scorer.quantized.observing():
        for batch in split.batches:
            hidden = scorer.trunk.hidden(batch.to(scorer.device))
            scorer.quantized.operands(scorer.trunk.head, hidden)
            advance()
    input_amax, unseen = fill_unseen(scorer.quantized.observed_ranges())
    cache = scorer.quantized.kv_cache
    return Calibration(
        input_amax=input_amax,
        unseen=unseen,
        expert_tokens=scorer.quantized.expert_counts(),
        kv_ranges=cache.observed_ranges() if cache is not None else {},
    )


def read_input_amax(file: Path, groups: Iterable[LayerGroup]) -> dict[str, float]:
    """The input ranges that a search has written to `calibration.json`.

    Raises:
        SourceError: missing, damaged, or without a range for an input of `groups`.
    """
    stored = read_json(file.parent, file.name)
    if stored is None or not isinstance(stored.get("input_amax"), dict):
        raise SourceError(f"{file} holds no input ranges.", fix=_OF_A_SEARCH)
    ranges = stored["input_amax"]
    for group in groups:
        for linear in group.linears:
            if not isinstance(ranges.get(linear.input_scale_set), (int, float)):
                raise SourceError(
                    f"{file} has no input range for {linear.input_scale_set}.", fix=_OF_A_SEARCH
                )
    return {str(name): float(amax) for name, amax in ranges.items()}


def read_kv_ranges(file: Path, attention: Iterable[str]) -> dict[str, KvRange]:
    """The largest keys and values that a search with an FP8 cache has written.

    Raises:
        SourceError: missing, damaged, or without a range for a module of `attention`.
    """
    stored = (read_json(file.parent, file.name) or {}).get("kv_amax")
    ranges = {}
    for name in attention:
        match stored.get(name) if isinstance(stored, dict) else None:
            case [int() | float() as keys, int() | float() as values]:
                ranges[name] = KvRange(keys=keys, values=values)
            case _:
                raise SourceError(
                    f"{file} has no range for the keys and values of {name}.",
                    fix="pass the calibration.json of a search with --kv-cache fp8, or leave it "
                    "out to calibrate.",
                )
    return ranges


def _as_lists(ranges: Mapping[str, KvRange]) -> dict[str, list[float]]:
    return {name: [found.keys, found.values] for name, found in ranges.items()}
