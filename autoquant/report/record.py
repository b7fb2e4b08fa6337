"""A run directory read back: every stage that is there, and the names of those that are not.

A file that another version of AutoQuant wrote counts as one that is not there, and is named.
Nothing here locks or writes, so a search that is still running can be looked at. KL is in nats per
token, sizes are in bytes, BPE in bits per element.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from autoquant.errors import ConfigError, SourceError
from autoquant.evaluate.evaluated import Evaluation
from autoquant.files import read_number
from autoquant.formats import Choice, all_formats
from autoquant.parsing import Unreadable, parse_yaml, read_text, why
from autoquant.search.stage_table import stage_table
from autoquant.store.records import SCHEMA_VERSION, OtherSchema
from autoquant.store.run_directory import (
    CALIBRATION,
    CONFIG,
    EVALUATION,
    GRADIENT_LOG,
    GROUPS,
    IDENTITY,
    RESULT,
    SENSITIVITY,
    SENSITIVITY_LOG,
    STUDY,
    TOKENS,
    TRIALS,
    Status,
    read_identity,
    read_json,
    read_records,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRow:
    """One layer group alone in one choice, all else in BF16."""

    group: str
    choice: str
    kl: float
    stderr: float | None
    """None where the search tokens held a single sequence, or the probes are not finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One assignment, measured on the search split."""

    number: int
    stage: str
    name: str
    kl: float
    stderr: float | None
    bpe: float
    tokens: int
    fits: bool
    """Whether it keeps the budget."""
    seconds: float
    predicted_kl: float
    """Sum of its groups' own KL."""
    joint_kl: float | None
    """Predicted with the interactions of groups by a fit that has not seen it; None before the
    search is finished."""
    is_stopped: bool
    """Whether it lost its race: `kl` is the rival's plus the difference on the tokens it saw."""
    is_frontier: bool
    """Whether no measured assignment of as few bits has a lower KL."""
    groups: Mapping[str, str]
    """Group name to choice."""

    @property
    def is_eligible(self) -> bool:
        """Whether it may win: within the budget, measured to the end, and its KL finite."""
        return self.fits and not self.is_stopped and math.isfinite(self.kl)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """One layer group, and the choice it has in the run's best assignment."""

    name: str
    role: str
    layer: int | None
    elements: int
    choice: str | None
    """None before the first trial that keeps the budget."""
    bytes: int | None
    """In `choice`."""
    is_open: bool
    """Whether the search space leaves more than one choice."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The files of one run directory."""

    path: Path
    identity: dict[str, Any]
    settings: dict[str, Any]
    result: dict[str, Any] | None
    plan: dict[str, Any] | None
    """The contents of `groups.json`."""
    calibration: dict[str, Any] | None
    tokens: dict[str, Any] | None
    method: str
    """How `probes` were found: exact, screened or gradient. Those of an unfinished probe stage are
    the measured ones, and so exact."""
    probes: tuple[ProbeRow, ...]
    trials: tuple[TrialRow, ...]
    missing: tuple[str, ...]
    """What an unfinished search has not come to, in words, and the files of other versions."""
    other_schema: tuple[str, ...]
    """Files that another version of AutoQuant wrote, and so are not read."""
    evaluation: Evaluation | None = None
    """What tasks have said of the run's assignments; None where none was run."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the run directory at `path`, finished or not.

        Raises:
            ConfigError: the folder is no run directory.
            SourceError: a file in it is damaged.
        """
        files = _Files(path)
        identity = files.identity() if path.is_dir() else None
        if identity is None:
            lack = "it has no run.json" if path.is_dir() else "there is no such folder"
            raise ConfigError(
                f"{path} is not a run directory: {lack}.",
                fix="name the folder that `autoquant search` printed, such as runs/NAME.",
            )
        try:
            return cls._of(files, identity)
        except (KeyError, TypeError, AttributeError) as error:
            raise SourceError(
                f"{path} is damaged: a record in it lacks {error}.",
                fix="restore the files, or start anew with --fresh.",
            ) from error

    @classmethod
    def _of(cls, files: "_Files", identity: dict[str, Any]) -> Self:
        result, plan = files.json(RESULT), files.json(GROUPS)
        stored = files.json(SENSITIVITY)
        log = [] if stored else files.records(SENSITIVITY_LOG)
        gradients = 0 if stored else len(files.records(GRADIENT_LOG))
        probes = _probes(stored["probes"]) if stored else _unfinished_probes(log)
        records = files.trials()
        calibration, tokens = files.json(CALIBRATION), files.json(TOKENS)
        evaluation = files.json(EVALUATION)
        absent = {
            "the plan (groups.json)": plan is None,
            "calibration": calibration is None,
            f"probes: {_progress(probes, gradients, plan)}": stored is None,
            "trials: none is measured": not records,
            "confirmation on fresh tokens (result.json)": result is None,
            "the KL of single tokens (tokens.json)": tokens is None,
        }
        return cls(
            path=files.path,
            identity=identity,
            settings=_settings(files.path / CONFIG),
            result=result,
            plan=plan,
            calibration=calibration,
            tokens=tokens,
            method=(stored or {}).get("method", "exact"),
            probes=probes,
            trials=_trials(records, probes, (result or {}).get("predictions")),
            missing=(
                *(name for name, is_absent in absent.items() if is_absent),
                *(f"{name}: {why}" for name, why in files.other_schema.items()),
            ),
            other_schema=tuple(files.other_schema),
            evaluation=None
            if evaluation is None
            else Evaluation.of(evaluation, str(files.path / EVALUATION)),
        )

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def status(self) -> Status:
        """As recorded; a search that has its result has only to let go of the directory."""
        status = Status(self.identity["status"])
        done = status is Status.RUNNING and self.result is not None
        return Status.FINISHED if done else status

    @cached_property
    def best(self) -> TrialRow | None:
        """The winner; before the end, the assignment of least KL that keeps the budget."""
        if self.result is not None:
            winner = self.result["winner"]["trial"]
            return next((t for t in self.trials if t.number == winner), None)
        return min((t for t in self.trials if t.is_eligible), key=lambda t: t.kl, default=None)

    @property
    def is_polished(self) -> bool:
        """Whether the polished winner is exported, which was not measured on the search tokens."""
        polish = (self.result or {}).get("polish") or {}
        return bool(polish.get("exported") == "polished")

    @cached_property
    def groups(self) -> tuple[GroupRow, ...]:
        """Every layer group in the order of the checkpoint."""
        chosen = self.best.groups if self.best is not None else {}
        rows = []
        for group in (self.plan or {}).get("groups", ()):
            sizes = group["choices"]
            choice = chosen.get(group["name"])
            size = sizes[choice] if choice is not None else None
            if choice is not None and self.is_polished:
                choice = str(Choice.parse(choice).refitted)
            rows.append(
                GroupRow(
                    name=group["name"],
                    role=group["role"],
                    layer=group["layer"],
                    elements=group["elements"],
                    choice=choice,
                    bytes=size,
                    is_open=len(sizes) > 1,
                )
            )
        return tuple(rows)

    @cached_property
    def cheapest_kl(self) -> dict[str, float]:
        """KL of each probed group in its best choice of the format of the fewest bits probed."""
        found: dict[str, float] = {}
        for format in all_formats():
            measured: dict[str, float] = {}
            for probe in self.probes:
                if probe.choice.partition("/")[0] == format.name:
                    own = measured.get(probe.group, probe.kl)
                    measured[probe.group] = min(own, probe.kl, key=_finite_first)
            found = measured | found
        return found

    def stages(self) -> list[dict[str, Any]]:
        """What each stage measured, took and gained; see `stage_table`."""
        return stage_table(self.trials)


class _Files:
    """What a run directory holds in the schema of this version.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.other_schema: dict[str, str] = {}
        """File to why it is not read."""

    def json(self, name: str) -> dict[str, Any] | None:
        try:
            return read_json(self.path, name)
        except OtherSchema as error:
            self._note(name, error)
            return None

    def records(self, name: str) -> list[dict[str, Any]]:
        try:
            return read_records(self.path, name)
        except OtherSchema as error:
            self._note(name, error)
            return []

    def trials(self) -> list[dict[str, Any]]:
        """Of the study, or of the log of an earlier version; a record each."""
        if not (self.path / STUDY).exists():
            return self.records(TRIALS)
        from autoquant.study.journal import read_trials

        try:
            return [trial.to_dict() for trial in read_trials(self.path)]
        except OtherSchema as error:
            self._note(STUDY, error)
            return []

    def identity(self) -> dict[str, Any] | None:
        """As this version writes it; of another version's, what there is of that."""
        try:
            return read_identity(self.path)
        except OtherSchema as error:
            self._note(IDENTITY, error)
        found: dict[str, Any] = json.loads((self.path / IDENTITY).read_text(encoding="utf-8"))
        found.pop("checksum", None)
        known = {"autoquant": "of another version", "created": "at an unknown time", **found}
        if known.get("status") not in set(Status):
            known["status"] = Status.INTERRUPTED
        if not isinstance(known.get("signature"), dict):
            known["signature"] = {}
        return known

    def _note(self, name: str, error: OtherSchema) -> None:
        self.other_schema[name] = (
            f"another version of AutoQuant wrote it, in schema {error.version}; this one reads "
            f"{SCHEMA_VERSION}"
        )


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = parse_yaml(read_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, Unreadable) as error:
        raise SourceError(
            f"{path} {why(error)}.",
            fix="restore the file, or start anew with --fresh.",
        ) from error
    return settings if isinstance(settings, dict) else {}


def _probes(records: Iterable[Mapping[str, Any]]) -> tuple[ProbeRow, ...]:
    return tuple(
        ProbeRow(group=r["group"], choice=r["choice"], kl=read_number(r["kl"]), stderr=r["stderr"])
        for r in records
    )


def _unfinished_probes(records: Iterable[Mapping[str, Any]]) -> tuple[ProbeRow, ...]:
    """Means over the batches that were measured."""
    sums: dict[tuple[str, str], tuple[float, int]] = {}
    for record in records:
        key = record["group"], record["choice"]
        total, tokens = sums.get(key, (0.0, 0))
        sums[key] = total + read_number(record["kl_sum"]), tokens + record["tokens"]
    return tuple(
        ProbeRow(group=group, choice=choice, kl=total / tokens, stderr=None)
        for (group, choice), (total, tokens) in sums.items()
    )


def _progress(probes: tuple[ProbeRow, ...], gradients: int, plan: Mapping[str, Any] | None) -> str:
    """How far the probes came; `gradients` is the number of batches with gradients' estimates."""
    if not probes:
        return f"gradients alone, batches done: {gradients}" if gradients else "none"
    if gradients:
        most = _most_screened(plan)
        return f"{len(probes)}{most} begun, one choice of a group on every second batch"
    of = f" of {plan['probes']}" if plan is not None else ""
    return f"{len(probes)}{of} begun, not every batch of tokens measured"


def _most_screened(plan: Mapping[str, Any] | None) -> str:
    """One probe of each group at most is measured where gradients have estimated all."""
    if plan is None:
        return ""
    return f" of at most {sum(len(group['choices']) > 1 for group in plan['groups'])}"


def _trials(
    records: Iterable[Mapping[str, Any]],
    probes: Iterable[ProbeRow],
    predictions: Mapping[str, Any] | None,
) -> tuple[TrialRow, ...]:
    records = sorted(records, key=lambda record: int(record["number"]))
    joint = {row["trial"]: row["kl"] for row in (predictions or {"trials": ()})["trials"]}
    alone = {(probe.group, probe.choice): probe.kl for probe in probes}
    frontier = _frontier(records)
    return tuple(
        TrialRow(
            number=record["number"],
            stage=record["stage"],
            name=record["name"],
            kl=read_number(record["kl"]),
            stderr=record["stderr"],
            bpe=record["bpe"],
            tokens=record["tokens"],
            fits=record["fits"],
            seconds=record["seconds"],
            predicted_kl=sum([alone.get(item, 0.0) for item in record["groups"].items()]),
            joint_kl=joint.get(record["number"]),
            is_stopped=record.get("is_stopped", False),
            is_frontier=record["number"] in frontier,
            groups=record["groups"],
        )
        for record in records
    )


def _frontier(records: Iterable[Mapping[str, Any]]) -> set[int]:
    """Numbers of the trials, measured to the end, that no other beats in both BPE and KL."""
    found, best = set(), math.inf
    whole = (
        (record["bpe"], kl, record["number"])
        for record in records
        if not record.get("is_stopped", False) and math.isfinite(kl := read_number(record["kl"]))
    )
    for _, kl, number in sorted(whole):
        if kl < best:
            found.add(number)
            best = kl
    return found


def _finite_first(kl: float) -> float:
    return kl if math.isfinite(kl) else math.inf
