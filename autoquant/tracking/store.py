"""The MLflow store of a search: found or made, its run opened, continued and ended."""

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

import autoquant
from autoquant.environment import git_commit, redact
from autoquant.files import clear_litter, temporary
from autoquant.store.run_directory import TRACKING, RunDirectory
from autoquant.tracking.recorder import Recorder, one_line
from autoquant.tracking.tracker import ChildRuns, NullTracker, Tracker

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_RUN_DIRECTORY = "autoquant.run_directory"
_LONGEST_PARAM = 6000

_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Set where the user has not: MLflow's own retries hold up every trial for minutes when a server
is gone, and a search reports to nobody whom the user has not named."""

_MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of the experiment: without it, MLflow's pages open among traces and prompts."""


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
    runs: Path | None = None,
) -> Iterator[Tracker]:
    """Record a search from before its model loads until it ends, however it ends.

    The store is `MLFLOW_TRACKING_URI`, else `mlflow.db` in the folder of runs with `mlartifacts`
    beside it. The run ends FINISHED, KILLED (KeyboardInterrupt) or FAILED.

    Args:
        run: held directory of the search; a resumed search continues the MLflow run named in it.
        settings: resolved settings, recorded as parameters.
        model: model as the user named it.
        source_digest: digest of the source checkpoint.
        experiment: MLflow experiment, created if it is absent.
        child_runs: trials that get a run of their own: all, those that improved, or none.
        warn: told once that recording failed, and at the end what is not recorded.
        runs: the folder of runs; what holds the run directory by default.
    """
    tags = {
        "autoquant.version": autoquant.__version__,
        "autoquant.model": model,
        "autoquant.source_digest": source_digest,
        _RUN_DIRECTORY: str(run.path.resolve()),
    }
    if (commit := git_commit()) is not None:
        tags["mlflow.source.git.commit"] = commit
    try:
        recorder = _open(
            run, (runs or run.path.parent).resolve(), settings, tags, experiment, child_runs, warn
        )
    except Exception as error:  # MLflow's, SQLAlchemy's, requests' or the file system's
        warn(f"this search is not recorded in MLflow: {one_line(error)}")
        yield NullTracker()
        return
    status = "FAILED"
    try:
        yield recorder
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        recorder.close(status)


def _open(
    run: RunDirectory,
    runs: Path,
    settings: Mapping[str, Any],
    tags: Mapping[str, str],
    experiment: str,
    child_runs: ChildRuns,
    warn: Callable[[str], None],
) -> Recorder:
    from mlflow.tracking.context.registry import resolve_tags

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    with FileLock(runs / ".mlflow.lock"):  # two searches must not create the tables at once
        client = client_of(runs, uri)
        artifacts = None if uri else (runs / "mlartifacts").as_uri()
        experiment_id = _experiment(client, experiment, artifacts)
    tracking = run.read_json(TRACKING)
    if tracking is None:
        continued = _unnamed(client, experiment_id, run)
    else:
        continued = _continued(client, tracking)
    if continued is None:
        run_id = client.create_run(
            experiment_id, tags=resolve_tags(tags), run_name=run.path.resolve().name
        ).info.run_id
    else:
        run_id, experiment_id = continued
        client.update_run(run_id, status="RUNNING")
    run.write_json(TRACKING, {"run_id": run_id, "tracking_uri": redact(uri)})
    _log_new_params(client, run_id, settings)
    return Recorder(
        client,
        experiment_id=experiment_id,
        run_id=run_id,
        folder=run.path,
        child_runs=child_runs,
        warn=warn,
    )


def client_of(runs: Path, uri: str | None) -> "MlflowClient":
    """MLflow's client of a store.

    Args:
        runs: folder of runs.
        uri: of the store; that of the folder if None.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import logging

    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri or _store_beside(runs))


def _store_beside(runs: Path) -> str:
    """Address of the SQLite store of a folder of runs, opened once: MLflow retries for minutes.

    Raises:
        sqlite3.Error: it cannot be read or is locked.
        ValueError: no address can name it.
    """
    from sqlalchemy.engine import make_url

    path = runs / "mlflow.db"
    uri = f"sqlite:///{path}"
    if make_url(uri).database != str(path):
        raise ValueError(f"{runs} has a character in its name that a database address cannot hold")
    if path.exists():
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA schema_version")
    else:
        _make_store(path)
    return uri


def _make_store(path: Path) -> None:
    """Make all tables, then show the file: MLflow cannot go on from half of them."""
    from mlflow.tracking import MlflowClient

    clear_litter(path.parent)
    unfinished = temporary(path)
    MlflowClient(tracking_uri=f"sqlite:///{unfinished}")
    unfinished.rename(path)


def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(name, artifact_location=artifacts, tags=_MODEL_TRAINING))


def _unnamed(
    client: "MlflowClient", experiment_id: str, run: RunDirectory
) -> tuple[str, str] | None:
    """The MLflow run of an earlier process that was killed before it wrote down which it is.

    It names this run directory, and is not older: that of a search before `--fresh` is.
    """
    since = int(run.created.timestamp() * 1000)
    for found in client.search_runs([experiment_id], f"attributes.start_time >= {since}"):
        if found.data.tags.get(_RUN_DIRECTORY) == str(run.path.resolve()):
            return str(found.info.run_id), experiment_id
    return None


def _continued(client: "MlflowClient", tracking: Mapping[str, Any]) -> tuple[str, str] | None:
    """Ids of the earlier process's MLflow run and of the experiment that it lies in.

    None where the store has lost it.
    """
    from mlflow.exceptions import MlflowException

    try:
        info = client.get_run(tracking["run_id"]).info
    except MlflowException:
        return None
    return str(info.run_id), str(info.experiment_id)


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
