"""What calibration sees of inputs: ranges, sizes of blocks, tokens of experts, keys and values.

Maxima and counts do not depend on the order of batches, nor on which process saw which.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from autoquant.data.tokens import Split
from autoquant.measure.compare import Ahead
from autoquant.measure.ranks.together import together
from autoquant.measure.scorer import Scorer
from autoquant.model.inputs import InputScale, small_of
from autoquant.plan.kv_cache import KvRange

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What some batches showed of the inputs of a live model in BF16."""

    ranges: dict[str, float | None]
    """Largest magnitude of each input set; None where no token arrived."""
    sizes: dict[str, torch.Tensor]
    """Blocks of each input set by the exponent of their largest magnitude, int64."""
    expert_tokens: dict[str, list[int]]
    """Tokens of each expert, by block."""
    kv_ranges: dict[str, KvRange]

    @property
    def small_blocks(self) -> dict[str, float]:
        """What the blocks of each input set are not below, few aside, where it is known."""
        found = {name: small_of(sizes) for name, sizes in self.sizes.items()}
        return {name: small for name, small in found.items() if small is not None}

    @classmethod
    def joined(cls, parts: Sequence["Observed"]) -> "Observed":
        """What all of these batches together showed."""
        return cls(
            ranges=_joined((part.ranges for part in parts), _largest),
            sizes=_joined((part.sizes for part in parts), torch.add),
            expert_tokens=_joined((part.expert_tokens for part in parts), _summed),
            kv_ranges=_joined((part.kv_ranges for part in parts), _widest),
        )


def observe_inputs(
    scorer: Scorer,
    split: Split,
    advance: Callable[[], None],
    *,
    all_experts: bool,
    ahead: Ahead | None = None,
) -> Observed:
    """Let the live model see every batch of `split`.

    Args:
        scorer: all groups in BF16.
        split: the calibration tokens.
        advance: called after each batch.
        all_experts: take input ranges from every expert on every token, whatever the routing.
        ahead: what else the BF16 model runs on in the pass.

    Raises:
        SourceError: NaN or Inf at some linear's input, which is named.
    """
    for wave in scorer.waves(split, range(len(split.batches)), forwards=1):
        _observe(scorer, split, wave, all_experts, ahead)
        ahead = None
        for _ in wave:
            advance()
    return Observed.joined([part for part in _observed(scorer, split) if part is not None])


@together
def use_scales(
    scorer: Scorer, scales: Mapping[str, InputScale], kv_ranges: Mapping[str, KvRange]
) -> None:
    """Fix the static scales of inputs, and of keys and values where the model has such a cache."""
    scorer.quantized.set_input_scales(scales)
    if scorer.quantized.kv_cache is not None:
        scorer.quantized.kv_cache.set_ranges(kv_ranges)


@together
def _observe(
    scorer: Scorer,
    split: Split,
    batches: Sequence[int],
    all_experts: bool,
    ahead: Ahead | None,
) -> None:
    own = [split.batches[index] for index in scorer.ranks.dealt(batches)]
    observing = partial(scorer.quantized.observing, all_experts=all_experts)

    def observe() -> None:
        seen = scorer.forward(own, inside=observing, ahead=ahead)
        with observing():
            for hidden in seen:
                scorer.quantized.operands(scorer.trunk.head, hidden)

    scorer.ranks.all_of(observe)


@together
def _observed(scorer: Scorer, split: Split) -> list[Observed | None]:
    """What each rank saw; None of a rank that was dealt no batch."""
    quantized, batches = scorer.quantized, range(len(split.batches))

    def seen() -> Observed | None:
        if not scorer.ranks.dealt(batches):
            return None
        cache = quantized.kv_cache
        return Observed(
            ranges=quantized.observed_ranges(),
            sizes=quantized.observed_sizes(),
            expert_tokens=quantized.expert_counts(),
            kv_ranges=cache.observed_ranges() if cache is not None else {},
        )

    return scorer.ranks.all_of(seen)


def _joined(
    parts: Iterable[Mapping[str, _Value]], join: Callable[[_Value, _Value], _Value]
) -> dict[str, _Value]:
    found: dict[str, _Value] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = join(found[name], value) if name in found else value
    return found


def _largest(one: float | None, other: float | None) -> float | None:
    return max((x for x in (one, other) if x is not None), default=None)


def _summed(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _widest(one: KvRange, other: KvRange) -> KvRange:
    return KvRange(keys=max(one.keys, other.keys), values=max(one.values, other.values))
