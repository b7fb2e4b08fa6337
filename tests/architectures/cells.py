"""What every architecture goes through: plan, search, export in each layout, verify, score."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import Result
from searchable import save_text

from autoquant.formats import Choice
from autoquant.plan.assignment import Assignment

LAYOUTS = ("modelopt", "compressed-tensors")
EXPERTS = (("nvfp4/mse", "fp8"), ("bf16", "nvfp4/four_over_six"))
TOKENS = (
    *("--calibration-tokens", 64, "--search-tokens", 64, "--report-tokens", 64),
    *("--sequence-length", 32, "--batch-tokens", 64),
)


@dataclass(frozen=True)
class Journey:
    """One miniature on its way through every command, each step's result as JSON."""

    source: Path
    folder: Path
    call: Callable[..., Result]

    def json(self, *arguments: object) -> dict[str, Any]:
        """What a command prints.

        Raises:
            AssertionError: it failed; says how.
        """
        result = self.call(*arguments, "--format", "json")
        assert result.exit_code == 0, f"{arguments[0]}: {result.stderr[-500:]}"
        assert "by their names" not in result.stderr, result.stderr
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    @property
    def tokens(self) -> tuple[object, ...]:
        text = self.folder / "text"
        if not text.exists():
            save_text(text)
        return (*TOKENS, "--calibration", text)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def plan(self) -> dict[str, Any]:
        return self.json("plan", self.source)

    def search(self, plan: dict[str, Any]) -> dict[str, Any]:
        """A search of no trials beyond the baselines, a third of the way from floor to ceiling."""
        low, high = (plan[limit]["bpe"]["checkpoint"] for limit in ("floor", "ceiling"))
        return self.json(
            *("search", self.source, "--budget-bpe", round(low + (high - low) / 3, 3)),
            *(*self.tokens, "--trials", 0, "--no-mlflow", "--out", self.run),
        )

    def mixes(self, plan: dict[str, Any]) -> list[Assignment]:
        """Formats in turn over the groups, so that each engine path is met.

        Experts take theirs in a turn of their own: NVFP4 and FP8 in one mix, BF16 and NVFP4 in the
        other. A model without experts has one mix.
        """
        has_experts = any(group["role"] == "experts" for group in plan["groups"])
        return [_in_turn(plan["groups"], turn) for turn in EXPERTS[: 2 if has_experts else 1]]

    def export(self, assignment: Assignment, layout: str, name: str | None = None) -> Path:
        """The source under `assignment`, with the search's input ranges, in the folder `name`."""
        file = self.folder / "mixed.json"
        file.write_text(json.dumps(assignment.to_dict()))
        target = self.folder / (name or layout)
        self.json(
            *("export", self.source, "--assignment", file, "--layout", layout),
            *("--calibrated", self.run / "calibration.json", "--out", target),
        )
        return target

    def verify(self, checkpoint: Path, *more: object) -> dict[str, Any]:
        found = self.json("verify", checkpoint, "--source", self.source, *more)
        assert found["ok"], found["problems"]
        return found

    def score(self, checkpoint: Path) -> dict[str, Any]:
        return self.json("score", self.source, "--checkpoint", checkpoint, *self.tokens)


def _in_turn(groups: list[dict[str, Any]], of_experts: tuple[str, ...]) -> Assignment:
    turn = itertools.cycle(("nvfp4/mse", "fp8", "bf16", "nvfp4/four_over_six", "fp8"))
    turn_of_experts = itertools.cycle(of_experts)
    chosen = {}
    for group in groups:
        wish = next(turn_of_experts if group["role"] == "experts" else turn)
        chosen[group["name"]] = wish if wish in group["choices"] else "bf16"
    return Assignment.of({name: Choice.parse(text) for name, text in chosen.items()})
