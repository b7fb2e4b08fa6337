"""A search of a few trials as MLflow records it, and what MLflow then holds."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from autoquant.formats import Choice
from autoquant.plan.assignment import Assignment
from autoquant.store.run_directory import RunDirectory
from autoquant.tracking import ChildRuns, Tracker, TrialRecord, track

SETTINGS = {"model": "org/model", "budget_bpe": 5.0, "seed": 0}
KLS = (0.5, 0.25, 0.375)
RESULT = {
    "budget_bpe": 5.0,
    "budget_scope": "checkpoint",
    "activation_mode": "w4a4",
    "calibration": "stdlib",
    "tokens": {"report": {"tokens": 8192, "digest": "d" * 64}},
    "kl": {"mean": 0.125, "stderr": None, "p99": 0.5},
    "perplexity": {"bf16": 10.0, "quantized": 10.5},
    "top1_agreement": 0.75,
    "bpe": {"checkpoint": 4.75},
    "checkpoint_bytes": 4096,
    "counts": {"nvfp4": 3, "fp8": 1, "bf16": 0},
    "winner": {"digest": "ab"},
    "baselines": [
        {"name": "uniform nvfp4", "bpe": 4.5, "kl": 0.25, "stderr": 0.01, "fits": True},
        {
            "name": "experts nvfp4, rest fp8",
            "bpe": 5.5,
            "kl": 0.0625,
            "stderr": None,
            "fits": False,
        },
    ],
}


def mix(number: int) -> Assignment:
    """`number` groups in NVFP4, one in FP8, two in BF16."""
    kinds = ["nvfp4/max"] * number + ["fp8", "bf16", "bf16"]
    return Assignment.of({f"g{i}": Choice.parse(kind) for i, kind in enumerate(kinds)})


class Search:
    """A search of a few trials, as the driver records it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warnings: list[str] = []

    def __call__(
        self,
        kls: tuple[float, ...] = KLS,
        *,
        settings: dict[str, Any] = SETTINGS,
        child_runs: ChildRuns = "none",
        experiment: str = "autoquant",
        over_budget: frozenset[int] = frozenset(),
        before: Callable[[Tracker], None] = lambda tracker: None,
        after: Callable[[Tracker], None] = lambda tracker: None,
    ) -> None:
        with (
            RunDirectory.open(self.folder, {"seed": 0}) as run,
            track(
                run,
                settings,
                model="org/model",
                source_digest="d1",
                experiment=experiment,
                child_runs=child_runs,
                warn=self.warnings.append,
            ) as tracker,
        ):
            before(tracker)
            run.write_json("groups.json", {"groups": []})
            for number, kl in enumerate(kls):
                tracker.trial(
                    TrialRecord(
                        number=number,
                        origin="solver: optimum",
                        kl=kl,
                        bpe=4.9,
                        fits=number not in over_budget,
                        seconds=2.0,
                        assignment=mix(number),
                    )
                )
            after(tracker)

    def wait_for_a_warning(self) -> None:
        """Return once what a thread sends has failed."""
        deadline = time.monotonic() + 60
        while not self.warnings:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def client(runs: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")


def all_runs(runs: Path, experiment: str = "autoquant") -> list[Run]:
    found = client(runs).get_experiment_by_name(experiment)
    return list(client(runs).search_runs([found.experiment_id])) if found else []


def the_run(runs: Path) -> Run:
    (run,) = all_runs(runs)
    return run


def history(runs: Path, metric: str) -> list[tuple[int, float]]:
    points = client(runs).get_metric_history(the_run(runs).info.run_id, metric)
    return sorted((point.step, point.value) for point in points)
