"""A search into one MLflow run; no call raises, and none but the last waits for the store."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from autoquant.environment import redact
from autoquant.files import to_json
from autoquant.store.run_directory import (
    ASSIGNMENT,
    CALIBRATION,
    CONFIG,
    GROUPS,
    REPORT,
    RESULT,
    SENSITIVITY,
    STUDY,
    TOKENS,
)
from autoquant.tracking.outcome import (
    description,
    log_checkpoint,
    recipe_figures,
    winner_figures,
)
from autoquant.tracking.tracker import ChildRuns, TrialRecord

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

ARTIFACTS = (
    *(CONFIG, GROUPS, CALIBRATION, SENSITIVITY, STUDY),
    *(ASSIGNMENT, RESULT, TOKENS, REPORT),
)

TRIAL_ASSIGNMENT = "assignment.json"
"""What `autoquant score` and `autoquant export` take as --assignment; of each child run."""

_DIGEST = 36
"""Characters that MLflow keeps of a data set's digest."""

_MOST_FAILURES = 2
"""In a row, when a search ends: a dead server must not be waited for at every record."""


class Recorder:
    """Records into one MLflow run; `autoquant.tracking.track` opens and closes it.

    A thread sends what the calls hand over: a commit waits for the disk, and a server for the
    network, several times a trial.
    """

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
        self._whole: set[str] = set()
        self._begun: dict[str, str] = {}
        """Child runs that have everything, by name, and run ids of the others; touched by the
        thread alone once it lives."""
        if child_runs != "none":
            self._find_children()
        self._datasets: set[str] = set()
        self._best_kl = math.inf
        self._unsent: deque[Callable[[], None]] = deque()
        """Touched by the thread alone while it lives."""
        self._has_failed = False
        self._given: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send_given, name="mlflow", daemon=True)
        self._sender.start()

    def dataset(self, name: str, *, digest: str, context: str, tokens: int) -> None:
        """Record the tokens of one split as a data set input of the run."""
        if context not in self._datasets:
            self._datasets.add(context)
            self._given.put(lambda: self._log_dataset(name, digest, context, tokens))

    def trial(self, record: TrialRecord) -> None:
        """Record the trial's metrics at its number, and its child run.

        `best_kl` is the least so far within the budget, and absent before there is one.
        """
        is_best = record.fits and record.kl < self._best_kl
        if is_best:
            self._best_kl = record.kl
        if self._child_runs == "all" or (self._child_runs == "best" and is_best):
            self._given.put(lambda: self._log_child(record))
        if record.number in self._recorded:
            return
        self._recorded.add(record.number)
        metrics = {
            "kl": record.kl,
            "best_kl": self._best_kl,
            "bpe": record.bpe,
            "seconds": record.seconds,
        }
        self._given.put(lambda: self._log_metrics(metrics, record.number))

    def result(self, result: Mapping[str, Any]) -> None:
        """Record the figures of the result, its description, and its checkpoint without weights."""
        text = result["calibration"]
        for context, split in result["tokens"].items():
            self.dataset(text, digest=split["digest"], context=context, tokens=split["tokens"])
        recipes, note = recipe_figures(result), description(result)
        self._given.put(lambda: self._log_figures(self._run_id, recipes))
        self._given.put(lambda: self._log_description(note))
        if "checkpoint" not in result:
            winner = winner_figures(result)
            self._given.put(lambda: self._log_figures(self._run_id, winner))
            return
        report = text, result["tokens"]["report"]["digest"][:_DIGEST]
        name = self._folder.resolve().name
        self._given.put(
            lambda: log_checkpoint(
                self._client, self._experiment_id, self._run_id, result, report, name
            )
        )

    def close(self, status: str) -> None:
        """Send what is left and the run directory's files, and end the run with a status."""
        self._given.put(None)
        self._sender.join()
        for name in ARTIFACTS:
            if (self._folder / name).exists():
                self._unsent.append(lambda name=name: self._log_file(name))  # type: ignore[misc]
        left = self._send_the_rest()
        left += not self._succeeds(lambda: self._client.set_terminated(self._run_id, status))
        if left:
            self._warn(
                f"{left} records of this search are not in MLflow; the same command sends them."
            )

    def _send_given(self) -> None:
        """Send in order until the store fails; from then on keep."""
        while (action := self._given.get()) is not None:
            if self._has_failed or not self._succeeds(action):
                self._unsent.append(action)

    def _send_the_rest(self) -> int:
        """Send each record that is left, whatever became of those before it; how many remain."""
        failures = left = 0
        while self._unsent and failures < _MOST_FAILURES:
            sent = self._succeeds(self._unsent.popleft())
            failures = 0 if sent else failures + 1
            left += not sent
        return left + len(self._unsent)

    def _succeeds(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # MLflow's, SQLAlchemy's, requests' or the file system's
            if not self._has_failed:
                self._warn(f"recording in MLflow failed, the search goes on: {one_line(error)}")
            self._has_failed = True
            return False
        return True

    def _log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._client.log_batch(self._run_id, metrics=metrics_at(metrics, step))

    def _log_figures(self, run_id: str, figures: Mapping[str, float]) -> None:
        """Record figures that a run has one of, as far as no earlier process has."""
        known = self._client.get_run(run_id).data.metrics
        missing = {name: value for name, value in figures.items() if name not in known}
        self._client.log_batch(run_id, metrics=metrics_at(missing, step=0))

    def _log_description(self, text: str) -> None:
        self._client.set_tag(self._run_id, "mlflow.note.content", text)

    def _log_child(self, record: TrialRecord) -> None:
        from mlflow.entities import Param

        assignment = record.assignment
        name = f"trial-{record.number:04d}"
        if name in self._whole:
            return
        run_id = self._begin_child(name, assignment.digest)
        counts = assignment.counts()
        params = [Param(f"groups.{kind}", str(count)) for kind, count in counts.items()]
        params += [Param("origin", record.origin), Param("fits", str(record.fits))]
        metrics = {"kl": record.kl, "bpe": record.bpe, "seconds": record.seconds}
        self._client.log_batch(run_id, params=params)
        self._log_figures(run_id, metrics)
        self._client.log_text(run_id, to_json(assignment.to_dict(), indent=2), TRIAL_ASSIGNMENT)
        self._client.set_terminated(run_id, "FINISHED")
        self._whole.add(name)

    def _begin_child(self, name: str, digest: str) -> str:
        """Run id of a new child run, or of the one that was begun before."""
        if name not in self._begun:
            tags = {"mlflow.parentRunId": self._run_id, "autoquant.plan.assignment": digest}
            child = self._client.create_run(self._experiment_id, tags=tags, run_name=name)
            self._begun[name] = child.info.run_id
        return self._begun[name]

    def _find_children(self) -> None:
        """Look up what an earlier process sent; one that was killed left child runs half sent."""
        query, token = f"tags.`mlflow.parentRunId` = '{self._run_id}'", None
        while True:
            page = self._client.search_runs([self._experiment_id], query, page_token=token)
            for child in page:
                if child.info.status == "FINISHED":
                    self._whole.add(child.info.run_name)
                else:
                    self._begun[child.info.run_name] = child.info.run_id
            token = page.token
            if not token:
                return

    def _log_dataset(self, name: str, digest: str, context: str, tokens: int) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = f'{{"num_tokens": {tokens}}}'
        dataset = Dataset(name, digest[:_DIGEST], "local", name, profile=profile)
        tag = InputTag("mlflow.data.context", context)
        self._client.log_inputs(self._run_id, datasets=[DatasetInput(dataset, [tag])])

    def _log_file(self, name: str) -> None:
        self._client.log_artifact(self._run_id, str(self._folder / name))


def metrics_at(values: Mapping[str, float], step: int) -> "list[Metric]":
    """Metrics of now; what is not finite is left out."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(name, v, now, step) for name, v in values.items() if math.isfinite(v)]


def one_line(error: Exception) -> str:
    """The first line of what went wrong, without credentials."""
    return (redact(str(error)) or type(error).__name__).strip().partition("\n")[0]
