"""One pass in BF16 over the calibration split: input ranges and expert coverage."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from autoquant.data.tokens import Split
from autoquant.errors import SourceError
from autoquant.groups import LayerGroup
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
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(
            input_amax=data["input_amax"],
            unseen=tuple(data["unseen"]),
            expert_tokens=data["expert_tokens"],
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
    return Calibration(
        input_amax=input_amax, unseen=unseen, expert_tokens=scorer.quantized.expert_counts()
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
