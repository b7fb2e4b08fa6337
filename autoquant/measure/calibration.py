"""One pass in BF16 over the calibration split: input ranges and expert coverage."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from autoquant.data.tokens import Split
from autoquant.errors import SourceError
from autoquant.formats.input_range import InputRange
from autoquant.measure.compare import Ahead
from autoquant.measure.scorer import Scorer
from autoquant.measure.statistics.observed import observe_inputs
from autoquant.model.inputs import InputScale, fill_unseen
from autoquant.plan.kv_cache import KvRange
from autoquant.plan.linears import LayerGroup
from autoquant.store.run_directory import read_json

FEW_TOKENS = 128
"""An expert that saw fewer calibration tokens may have an input range that is too small."""

_NOT_OF_AN_EXPORT: dict[str, Any] = {
    "unseen": (),
    "tokens": 0,
    "expert_tokens": {},
    "all_experts": False,
}
"""What ranges that people write by hand may leave out."""

_OF_A_SEARCH = "pass the calibration.json of a search of this model, or leave it out to calibrate."


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the calibration split told about the model."""

    input_amax: dict[str, float]
    """Largest input magnitude of each input scale set, complete."""
    unseen: tuple[str, ...]
    """Input sets that no calibration token reached; they took their block's largest range."""
    tokens: int
    """Tokens of the calibration split."""
    expert_tokens: dict[str, list[int]]
    """Tokens routed to each expert of each block."""
    all_experts: bool = False
    """Whether every expert was shown every token, not only those routed to it."""
    kv_ranges: dict[str, KvRange] = field(default_factory=dict)
    """Largest keys and values of each attention module; empty where the cache stays in BF16."""
    small_blocks: dict[str, float] = field(default_factory=dict)
    """What the largest magnitude of 99 blocks of 100 is not below, by input scale set."""
    headroom: float = 1.0
    """How many times the largest magnitude input scales are to hold."""

    def ranges(self) -> dict[str, float]:
        """The magnitude that the static scale of each input scale set holds."""
        return {
            name: InputRange(amax=amax, small=self.small_blocks.get(name)).with_headroom(
                self.headroom
            )
            for name, amax in self.input_amax.items()
        }

    def scales(self) -> dict[str, InputScale]:
        """Static input scales, as they are exported."""
        return {name: InputScale(amax=amax) for name, amax in self.ranges().items()}

    def coverage(self) -> "Coverage | None":
        """How well routing has covered the experts; None for a model without any."""
        counts = [count for tokens in self.expert_tokens.values() for count in tokens]
        if not counts:
            return None
        seen = [count for count in counts if count]
        few = sum(count < FEW_TOKENS for count in counts)
        needed = math.ceil(self.tokens * FEW_TOKENS / min(seen)) if few and seen else None
        return Coverage(
            experts=len(counts), few=few, idle=counts.count(0), tokens=self.tokens, needed=needed
        )

    def warning(self) -> str | None:
        """What to tell the user of experts that saw too little, or None."""
        coverage = self.coverage()
        return None if coverage is None or self.all_experts else coverage.warning()

    def to_dict(self) -> dict[str, Any]:
        return {
            "input_amax": self.input_amax,
            "unseen": list(self.unseen),
            "tokens": self.tokens,
            "expert_tokens": self.expert_tokens,
            "all_experts": self.all_experts,
            "small_blocks": self.small_blocks,
            "headroom": self.headroom,
        } | ({"kv_amax": _as_lists(self.kv_ranges)} if self.kv_ranges else {})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """What `to_dict` gave.

        Raises:
            SourceError: something is missing.
        """
        try:
            return cls(
                input_amax=data["input_amax"],
                unseen=tuple(data["unseen"]),
                tokens=data["tokens"],
                expert_tokens=data["expert_tokens"],
                all_experts=data["all_experts"],
                kv_ranges={name: KvRange(*pair) for name, pair in data.get("kv_amax", {}).items()},
                small_blocks=data.get("small_blocks", {}),
                headroom=data.get("headroom", 1.0),
            )
        except KeyError as missing:
            raise SourceError(
                f"the stored calibration lacks {missing}: another version wrote it.",
                fix="start anew with --fresh (the earlier run is set aside).",
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How many of the calibration tokens the experts of a model saw."""

    experts: int
    """Of all blocks together."""
    few: int
    """Those that saw fewer than `FEW_TOKENS`, idle ones included."""
    idle: int
    """Those that saw none."""
    tokens: int
    """Tokens of the calibration split."""
    needed: int | None
    """Tokens of a split that would show `FEW_TOKENS` to the least used expert that is not idle, at
    the share that it had of this one; None where none is short."""

    def warning(self) -> str | None:
        """What to tell the user, or None where every expert saw enough."""
        if not self.few:
            return None
        idle = f", {self.idle} of them none" if self.idle else ""
        return (
            f"{self.few} of {self.experts} experts ({self.few / self.experts:.1%}) saw fewer than "
            f"{FEW_TOKENS} of {self.tokens} calibration tokens{idle}. About "
            f"--calibration-tokens {self.needed} would reach "
            f"{'those that saw any' if self.idle else 'all'}; --calibrate-all-experts shows every "
            "expert every token."
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return dataclasses.asdict(self) | {
            "threshold": FEW_TOKENS,
            "share": self.few / self.experts,
        }


def calibrate(
    scorer: Scorer,
    split: Split,
    advance: Callable[[], None],
    *,
    all_experts: bool = False,
    headroom: float = 1.0,
    ahead: Ahead | None = None,
) -> Calibration:
    """Observe every batch of `split`.

    Args:
        scorer: all groups in BF16.
        split: the calibration tokens.
        advance: called after each batch.
        all_experts: take input ranges from every expert on every token, whatever the routing.
        headroom: how many times the largest magnitude input scales are to hold.
        ahead: what else the BF16 model runs on in the pass.

    Raises:
        SourceError: NaN or Inf at some linear's input, which is named.
    """
    seen = observe_inputs(scorer, split, advance, all_experts=all_experts, ahead=ahead)
    input_amax, unseen = fill_unseen(seen.ranges)
    return Calibration(
        input_amax=input_amax,
        unseen=unseen,
        tokens=split.tokens,
        expert_tokens=seen.expert_tokens,
        all_experts=all_experts,
        kv_ranges=seen.kv_ranges,
        small_blocks=seen.small_blocks,
        headroom=headroom,
    )


def read_calibration(
    file: Path, groups: Iterable[LayerGroup], attention: Iterable[str]
) -> Calibration:
    """What a search has written to `calibration.json`, with all that an export needs.

    Args:
        file: of the search.
        groups: whose inputs need a range.
        attention: modules whose keys and values need a range.

    Raises:
        SourceError: missing, damaged, or without a range that is needed.
    """
    stored = read_json(file.parent, file.name) or {}
    if not isinstance(stored.get("input_amax"), dict):
        raise SourceError(f"{file} holds no input ranges.", fix=_OF_A_SEARCH)
    for group in groups:
        for linear in group.linears:
            if not isinstance(stored["input_amax"].get(linear.input_scale_set), (int, float)):
                raise SourceError(
                    f"{file} has no input range for {linear.input_scale_set}.", fix=_OF_A_SEARCH
                )
    _require_headroom(file, stored)
    found = stored.get("kv_amax")
    for name in attention:
        match found.get(name) if isinstance(found, dict) else None:
            case [int() | float(), int() | float()]:
                pass
            case _:
                raise SourceError(
                    f"{file} has no range for the keys and values of {name}.",
                    fix="pass the calibration.json of a search with --kv-cache fp8, or leave it "
                    "out to calibrate.",
                )
    calibration = Calibration.from_dict(_NOT_OF_AN_EXPORT | stored)
    return dataclasses.replace(
        calibration, kv_ranges={name: calibration.kv_ranges[name] for name in attention}
    )


def _require_headroom(file: Path, stored: Mapping[str, Any]) -> None:
    """Return if what widens the ranges is there as a search writes it, or not at all."""
    headroom, small = stored.get("headroom", 1.0), stored.get("small_blocks", {})
    is_number = isinstance(headroom, (int, float)) and 1.0 <= headroom < math.inf
    if not is_number or not isinstance(small, dict):
        raise SourceError(f"{file} holds no headroom from 1 up of its ranges.", fix=_OF_A_SEARCH)
    if not all(isinstance(size, (int, float)) and size > 0 for size in small.values()):
        raise SourceError(f"{file} holds sizes of small blocks that are none.", fix=_OF_A_SEARCH)


def _as_lists(ranges: Mapping[str, KvRange]) -> dict[str, list[float]]:
    return {name: [found.keys, found.values] for name, found in ranges.items()}
