"""Scores of tasks in the MLflow run of their search."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from autoquant.evaluate.evaluated import Evaluation
from autoquant.store.run_directory import EVALUATION, REPORT, TRACKING, read_json
from autoquant.tracking.recorder import metrics_at, one_line
from autoquant.tracking.store import client_of

_NOT_IN_A_METRIC = re.compile(r"[^\w./ :-]")


def figures_of(found: Evaluation) -> dict[str, float]:
    """Metrics by name, `task/TASK/FIGURE/ASSIGNMENT`."""
    return {
        _NOT_IN_A_METRIC.sub("", f"task/{s.task}/{metric.name}/{s.name}"): metric.value
        for s in found.scores
        for metric in s.metrics
    }


def record_evaluation(run: Path, found: Evaluation, warn: Callable[[str], None]) -> None:
    """Add the figures, and the files that hold them, to the MLflow run that a search has made.

    A search that was not recorded has none. What fails costs nothing but a warning.

    Args:
        run: directory of the search.
        found: new scores.
        warn: told of a failure.
    """
    tracking = read_json(run, TRACKING)
    if tracking is None:
        return
    try:
        client = client_of(run.resolve().parent, os.environ.get("MLFLOW_TRACKING_URI"))
        run_id = str(tracking["run_id"])
        client.log_batch(run_id, metrics=metrics_at(figures_of(found), step=0))
        for name in (EVALUATION, REPORT):
            if (run / name).exists():
                client.log_artifact(run_id, str(run / name))
    except Exception as error:  # MLflow's, SQLAlchemy's, requests' or the file system's
        warn(f"these scores are not recorded in MLflow: {one_line(error)}")
