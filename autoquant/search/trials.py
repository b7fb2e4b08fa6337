"""Trials: candidates and their joint KL on the search split."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from autoquant.files import json_number, read_number
from autoquant.formats import Choice
from autoquant.plan.assignment import Assignment


class Stage(StrEnum):
    """Where a candidate came from."""

    BASELINE = "baseline"
    SOLVER = "solver"
    RULES = "rules"
    RUNNER_UP = "runner-up"
    REWEIGHT = "reweight"
    SAMPLER = "sampler"
    REFIT = "refit"
    SWAP = "swap"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One candidate, measured on the search split."""

    number: int
    stage: Stage
    name: str
    """What it is in words: a baseline's name, the rank of a runner-up, the groups of a swap."""
    assignment: Assignment
    kl: float
    """Mean, nats per token; of a stopped candidate the rival's plus their mean difference. Not
    finite where the model's output overflows."""
    stderr: float
    """Of `kl`; of a stopped candidate that of the difference."""
    sequence_kl: tuple[float, ...]
    """Mean KL of each sequence measured, nats per token, for paired comparisons."""
    tokens: int
    """Tokens measured."""
    is_stopped: bool
    """Whether it was clearly worse than the best before all tokens were measured."""
    bpe: float
    fits: bool
    """Whether it keeps the budget."""
    seconds: float
    params: Mapping[str, float] = field(default_factory=dict)
    """Parameters of a reweighting; empty for other stages."""
    predicted: float | None = None
    """Joint KL, nats per token, by the fit that proposed it."""
    rival: int | None = None
    """Number of the trial that it raced against."""
    seen: int | None = None
    """How many trials its proposal rests on."""

    @property
    def order(self) -> tuple[float, int]:
        """Sorts trials, the least KL first and the earlier of equals; a KL that is not finite comes
        after every other.
        """
        return (self.kl if math.isfinite(self.kl) else math.inf), self.number

    @property
    def is_eligible(self) -> bool:
        """Whether it may win: within the budget, measured to the end, and its KL finite."""
        return self.fits and self.is_whole

    @property
    def is_whole(self) -> bool:
        """Whether it was measured to the end, and its KL is finite."""
        return not self.is_stopped and math.isfinite(self.kl)

    def beats(self, other: "Trial") -> bool:
        """Whether its KL is the lower; one that is not finite beats none."""
        return self.order[0] < other.order[0]

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "stage": str(self.stage),
            "name": self.name,
            "kl": json_number(self.kl),
            "stderr": self.stderr,
            "bpe": self.bpe,
            "fits": self.fits,
            "seconds": self.seconds,
            "digest": self.assignment.digest,
            "params": dict(self.params),
            "predicted": self.predicted,
            "rival": self.rival,
            "seen": self.seen,
            "tokens": self.tokens,
            "is_stopped": self.is_stopped,
            "sequence_kl": [json_number(kl) for kl in self.sequence_kl],
            "groups": {name: str(choice) for name, choice in self.assignment},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Trial":
        groups = {name: Choice.parse(choice) for name, choice in data["groups"].items()}
        return cls(
            number=data["number"],
            stage=Stage(data["stage"]),
            name=data["name"],
            assignment=Assignment.of(groups),
            kl=read_number(data["kl"]),
            stderr=read_number(data["stderr"]),
            sequence_kl=tuple(map(read_number, data["sequence_kl"])),
            tokens=data["tokens"],
            is_stopped=data["is_stopped"],
            bpe=data["bpe"],
            fits=data["fits"],
            seconds=data["seconds"],
            params=data["params"],
            predicted=data.get("predicted"),
            rival=data.get("rival"),
            seen=data.get("seen"),
        )
