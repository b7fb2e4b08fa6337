"""Records of a run as a test may change them."""

import json
from pathlib import Path

from autoquant.files import to_json
from autoquant.study.journal import read_trials


def trials_of(run: Path) -> list[dict]:
    """The trials of a run, a record each."""
    return [json.loads(to_json(trial.to_dict())) for trial in read_trials(run)]


def write_trials(run: Path, records: list[dict]) -> None:
    """Give the run these trials, as an earlier version kept them."""
    (run / "study.log").unlink(missing_ok=True)
    lines = [json.dumps({"schema_version": 1, **record}) + "\n" for record in records]
    (run / "trials.jsonl").write_text("".join(lines))


def timeless(journal: Path) -> list[dict]:
    """The lines of a study's journal without times and what names a process."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        for key in ("checksum", "worker_id", "datetime_start", "datetime_complete"):
            line.pop(key, None)
        if "user_attrs" in line:
            line["user_attrs"].pop("seconds", None)  # a frontier has none
    return lines


def forget_checksums(run: Path) -> None:
    """Make the run one of an earlier version, which wrote no checksums."""
    for path in run.glob("*.json"):
        path.write_text(json.dumps(_without(json.loads(path.read_text()))))
    for path in (*run.glob("*.jsonl"), *run.glob("study.log")):
        lines = path.read_text().splitlines()
        path.write_text("".join(json.dumps(_without(json.loads(line))) + "\n" for line in lines))


def _without(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in ("checksum", "sealed")}
