"""Searches recorded in MLflow: one run per search, its trials as metrics by step.

Recording never costs a search: a store that cannot be opened, or that fails later, is one warning.
What could not be sent is kept and sent again when the search ends.

MLflow's own Optuna storage and callbacks are not used: they write every distribution into one tag,
which overflows at some 60 layer groups, and cost seconds a trial.
"""

import math
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from filelock import FileLock

import autoquant
from autoquant.environment import git_commit, redact
from autoquant.rundir import (
    ASSIGNMENT,
    CONFIG,
    GROUPS,
    REPORT,
    RESULT,
    SENSITIVITY,
    TRIALS,
    RunDirectory,
)

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TRACKING = "tracking.json"
"""File of the run directory that names the MLflow run, so that a resumed search continues it."""

ARTIFACTS = (CONFIG, GROUPS, SENSITIVITY, TRIALS, ASSIGNMENT, RESULT, REPORT)

ChildRuns = Literal["all", "best", "none"]

_LONGEST_PARAM = 6000

_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Set where the user has not: MLflow's own retries hold up every trial for minutes when a server
is gone, and a search reports to nobody whom the user has not named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """What is recorded of one measured candidate."""

    number: int
    origin: str
    """Who proposed it: `baseline: uniform fp8`."""
    kl: float
    """Nats per token."""
    bpe: float
    fits: bool
    """Whether it is within the budget; baselines need not be."""
    seconds: float
    counts: Mapping[str, int]
    """Layer groups per format."""
    digest: str
    """Of the assignment."""


class Tracker(Protocol):
    """Where a search is recorded. No method raises."""

    def dataset(self, name: str, *, digest: str, context: str, tokens: int) -> None:
        """Record the tokens of one split; `context` is `calibration`, `search` or `report`."""

    def trial(self, record: TrialRecord) -> None:
        """Record a trial; one that an earlier process recorded is skipped."""

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Record the figures of the result."""


class NullTracker:
    """Records nothing."""

    def dataset(self, name: str, *, digest: str, context: str, tokens: int) -> None:
        """Do nothing."""

    def trial(self, record: TrialRecord) -> None:
        """Do nothing."""

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Do nothing."""


@contextmanager
def track(
    run: RunDirectory,
    settings: Mapping[str, Any],
    *,
    model: str,
    source_digest: str,
    experiment: str,
    child_runs: ChildRuns,
    warn: Callable[[str], None],
) -> Iterator[Tracker]:
    """Record a search from before its model loads until it ends, however it ends.

    The store is `MLFLOW_TRACKING_URI`, else `mlflow.db` beside the run directory with `mlartifacts`
    beside it. The run ends FINISHED, KILLED (KeyboardInterrupt) or FAILED.

    Args:
        run: held directory of the search; a resumed search continues the MLflow run named in it.
        settings: resolved settings, recorded as parameters.
        model: model as the user named it.
        source_digest: digest of the source checkpoint.
        experiment: MLflow experiment, created if it is absent.
        child_runs: trials that get a run of their own: all, those that improved, or none.
        warn: told once that recording failed.
    """
    tags = {
        "autoquant.version": autoquant.__version__,
        "autoquant.model": model,
        "autoquant.source_digest": source_digest,
        "autoquant.run_directory": str(run.path),
    }
    if (commit := git_commit()) is not None:
        tags["mlflow.source.git.commit"] = commit
    try:
        tracker = _open(run, settings, tags, experiment, child_runs, warn)
    except Exception as error:  # MLflow's, SQLAlchemy's, requests' or the file system's
        warn(f"this search is not recorded in MLflow: {_one_line(error)}")
        yield NullTracker()
        return
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close(status)


class MlflowTracker:
    """Records into one MLflow run; `track` opens and closes it."""

    def __init__(
        self,
        client: "MlflowClient",
        *,
        experiment_id: str,
        run_id: str,
        folder: Path,
        child_runs: ChildRuns,
        warn: Callable[[str], None],
    ) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._run_id = run_id
        self._folder = folder
        self._child_runs = child_runs
        self._warn = warn
        self._recorded = {metric.step for metric in client.get_metric_history(run_id, "kl")}
        self._best_kl = math.inf
        self._unsent: deque[Callable[[], None]] = deque()
        self._has_failed = False

    def dataset(self, name: str, *, digest: str, context: str, tokens: int) -> None:
        """Record the tokens of one split as a data set input of the run."""
        self._send(lambda: self._log_dataset(name, digest, context, tokens))

    def trial(self, record: TrialRecord) -> None:
        """Record the trial's metrics at its number, and its child run.

        `best_kl` is the least so far within the budget, and absent before there is one.
        """
        is_best = record.fits and record.kl < self._best_kl
        if is_best:
            self._best_kl = record.kl
        if record.number in self._recorded:
            return
        self._recorded.add(record.number)
        metrics = {
            "kl": record.kl,
            "best_kl": self._best_kl,
            "bpe": record.bpe,
            "seconds": record.seconds,
        }
        self._send(lambda: self._log_metrics(self._run_id, metrics, record.number))
        if self._child_runs == "all" or (self._child_runs == "best" and is_best):
            self._send(lambda: self._log_child(record))

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Record the figures of the result as metrics of the run."""
        self._send(lambda: self._log_metrics(self._run_id, metrics, step=0))

    def close(self, status: str) -> None:
        """Record the run directory's files and end the run with an MLflow status."""
        for name in ARTIFACTS:
            if (self._folder / name).exists():
                self._unsent.append(lambda name=name: self._log_file(name))  # type: ignore[misc]
        self._unsent.append(lambda: self._client.set_terminated(self._run_id, status))
        self._flush()

    def _send(self, action: Callable[[], None]) -> None:
        self._unsent.append(action)
        if not self._has_failed:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._unsent[0]()
                self._unsent.popleft()
        except Exception as error:
            if not self._has_failed:
                self._warn(f"recording in MLflow failed, the search goes on: {_one_line(error)}")
            self._has_failed = True

    def _log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = _now()
        self._client.log_batch(
            run_id,
            metrics=[
                Metric(name, value, now, step)
                for name, value in metrics.items()
                if math.isfinite(value)
            ],
        )

    def _log_child(self, record: TrialRecord) -> None:
        from mlflow.entities import Param

        tags = {"mlflow.parentRunId": self._run_id, "autoquant.assignment": record.digest}
        name = f"trial-{record.number:04d}"
        run_id = self._client.create_run(self._experiment_id, tags=tags, run_name=name).info.run_id
        params = [Param(f"groups.{name}", str(count)) for name, count in record.counts.items()]
        params += [Param("origin", record.origin), Param("fits", str(record.fits))]
        self._client.log_batch(run_id, params=params)
        metrics = {"kl": record.kl, "bpe": record.bpe, "seconds": record.seconds}
        self._log_metrics(run_id, metrics, step=0)
        self._client.set_terminated(run_id, "FINISHED")

    def _log_dataset(self, name: str, digest: str, context: str, tokens: int) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = f'{{"num_tokens": {tokens}}}'
        dataset = Dataset(name, digest[:36], "local", name, profile=profile)
        tag = InputTag("mlflow.data.context", context)
        self._client.log_inputs(self._run_id, datasets=[DatasetInput(dataset, [tag])])

    def _log_file(self, name: str) -> None:
        self._client.log_artifact(self._run_id, str(self._folder / name))


def _open(
    run: RunDirectory,
    settings: Mapping[str, Any],
    tags: Mapping[str, str],
    experiment: str,
    child_runs: ChildRuns,
    warn: Callable[[str], None],
) -> MlflowTracker:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import logging

    from mlflow.tracking import MlflowClient
    from mlflow.tracking.context.registry import resolve_tags

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    runs = run.path.resolve().parent
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    with FileLock(runs / ".mlflow.lock"):  # two searches must not create the tables at once
        client = MlflowClient(tracking_uri=uri or _store_beside(runs))
        artifacts = None if uri else (runs / "mlartifacts").as_uri()
        experiment_id = _experiment(client, experiment, artifacts)
    run_id = _continued(client, run.read_json(TRACKING))
    if run_id is None:
        run_id = client.create_run(
            experiment_id, tags=resolve_tags(tags), run_name=run.path.resolve().name
        ).info.run_id
    else:
        client.update_run(run_id, status="RUNNING")
    run.write_json(TRACKING, {"run_id": run_id, "tracking_uri": redact(uri)})
    _log_new_params(client, run_id, settings)
    return MlflowTracker(
        client,
        experiment_id=experiment_id,
        run_id=run_id,
        folder=run.path,
        child_runs=child_runs,
        warn=warn,
    )


def _store_beside(runs: Path) -> str:
    """Address of the SQLite store of a folder of runs, opened once: MLflow retries for minutes."""
    from sqlalchemy.engine import make_url

    path = runs / "mlflow.db"
    uri = f"sqlite:///{path}"
    if make_url(uri).database != str(path):
        raise ValueError(f"{runs} has a character in its name that a database address cannot hold")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA schema_version")
    return uri


def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(name, artifact_location=artifacts))


def _continued(client: "MlflowClient", tracking: Mapping[str, Any] | None) -> str | None:
    """The earlier process's MLflow run, or None if there was none or the store has lost it."""
    from mlflow.exceptions import MlflowException

    if tracking is None:
        return None
    try:
        return str(client.get_run(tracking["run_id"]).info.run_id)
    except MlflowException:
        return None


def _log_new_params(client: "MlflowClient", run_id: str, settings: Mapping[str, Any]) -> None:
    """Record the settings that the run does not have yet: MLflow's parameters never change."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    params = [
        Param(name, (redact(str(value)) or "")[:_LONGEST_PARAM])
        for name, value in settings.items()
        if name not in known
    ]
    client.log_batch(run_id, params=params)


def _now() -> int:
    return int(time.time() * 1000)


def _one_line(error: Exception) -> str:
    return (redact(str(error)) or type(error).__name__).strip().partition("\n")[0]
