"""What each stage of a search measured, took and gained: one table for results and reports."""

from collections.abc import Iterable
from typing import Any, Protocol


class Measured(Protocol):
    """What the table needs of a trial."""

    @property
    def stage(self) -> str: ...
    @property
    def kl(self) -> float: ...
    @property
    def is_eligible(self) -> bool: ...
    @property
    def is_stopped(self) -> bool: ...
    @property
    def tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...


def stage_table(trials: Iterable[Measured]) -> list[dict[str, Any]]:
    """A row for each stage, in the order in which they began.

    `trials`, those `stopped` early, `tokens` and `seconds` count all trials of the stage. `best_kl`
    is the least KL of those that may win, nats per token on the search split; None without any.
    `gain` is the share by which the stage lowered the least KL of all; None for the stage that
    measured the first that may win.

    Args:
        trials: in the order in which they were measured.
    """
    rows: dict[str, dict[str, Any]] = {}
    best: float | None = None
    for trial in trials:
        row = rows.setdefault(str(trial.stage), _empty(str(trial.stage)))
        row["trials"] += 1
        row["stopped"] += trial.is_stopped
        row["tokens"] += trial.tokens
        row["seconds"] += trial.seconds
        if not trial.is_eligible:
            continue
        own = row["best_kl"]
        row["best_kl"] = trial.kl if own is None else min(own, trial.kl)
        if best is None:
            row["gain"] = None
        elif trial.kl < best and row["gain"] is not None:
            row["gain"] = 1 - (1 - row["gain"]) * trial.kl / best
        best = trial.kl if best is None else min(best, trial.kl)
    return list(rows.values())


def _empty(stage: str) -> dict[str, Any]:
    counts = {"trials": 0, "stopped": 0, "tokens": 0, "seconds": 0.0}
    return {"stage": stage, **counts, "best_kl": None, "gain": 0.0}
