"""The stages up to the probes: load, calibrate, probe."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autoquant.codes.statistics_size import groups_with_moments
from autoquant.environment import measuring_on
from autoquant.errors import RunConflict, SourceError
from autoquant.formats import BF16
from autoquant.measure.calibration import Calibration
from autoquant.measure.compare import Ahead
from autoquant.measure.ranks.ranks import Ranks
from autoquant.measure.ranks.together import announce_step
from autoquant.measure.sensitivity import Sensitivity, keys_of
from autoquant.measure.session import Session
from autoquant.measure.statistics.moments import take_along
from autoquant.measure.statistics.shared_codes import share_codes
from autoquant.model.memory import DeviceMemory
from autoquant.plan.kv_cache import cached_attention
from autoquant.plan.plan import Plan
from autoquant.progress import Progress
from autoquant.run.config import ProbeConfig
from autoquant.run.cpu_work import work_bytes
from autoquant.run.measuring import (
    calibrate_session,
    code_cache,
    collect_statistics,
    open_measuring,
    statistics_store,
    use_calibration,
)
from autoquant.run.observer import Observer
from autoquant.run.sensitivity.probes import Probes
from autoquant.run.sensitivity.work import Work
from autoquant.run.shared import Shared
from autoquant.run.signature import NUMERICS_VERSION
from autoquant.store.run_directory import (
    CALIBRATION,
    GROUPS,
    SECONDS,
    SENSITIVITY,
    SPLITS,
    WORK,
    RunDirectory,
    read_identity,
    read_seconds,
)
from autoquant.tracking import NullTracker, Tracker

LOAD = "load"
"""The step in which followers load the model, told the run directory and its signature."""


@dataclass(kw_only=True)
class Probing:
    """Probes in one run directory, of their own or of a search."""

    config: ProbeConfig
    plan: Plan
    """What the configuration names, opened."""
    run: RunDirectory
    observer: Observer
    tracker: Tracker = field(default_factory=NullTracker)
    shared: Shared = field(default_factory=Shared)
    """With searches of other budgets."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Spent on each stage, by earlier processes too."""

    def __post_init__(self) -> None:
        try:
            self.seconds |= read_seconds(self.run.path)
        except SourceError as error:
            self.observer.warn(f"{error.message} Times count from here on.")

    def probe(self) -> dict[str, Any]:
        """Run the stages up to the probes; what `sensitivity.json` holds.

        Raises:
            RunConflict: the text or the tokenizer changed since the run began.
            SourceError: model or text missing, damaged or not understood.
        """
        stored = self.run.read_json(SENSITIVITY)
        if stored is not None:
            self.observer.note(f"{self.run.path} already holds these probes.")
            return stored
        self._keep_plan()
        session = self._open()
        self._calibrate(session)
        self._probe(session)
        return self.run.read_json(SENSITIVITY) or {}

    def _keep_plan(self) -> None:
        for warning in self.plan.options.warnings:
            self.observer.warn(warning)
        self.run.write_json(GROUPS, self.plan.to_dict())

    def _open(self) -> Session:
        session = self.shared.session or self._load()
        self._require_same_tokens(session)
        self._record_environment(session)
        for name, split in session.splits.items():
            self.tracker.dataset(
                self.config.text, digest=split.digest, context=name, tokens=split.tokens
            )
        return session

    def _load(self) -> Session:
        ranks, home = self.shared.ranks, self.shared.home(self.run.path)
        signature = (read_identity(home) or {}).get("signature", {})
        announce_step(ranks, LOAD, str(home.absolute()), signature)
        with self._timed("load"):
            session = self.shared.session = ranks.own(
                lambda: open_to_probe(self.config, self.plan, home, self.observer, ranks)
            )
        return session

    def _require_same_tokens(self, session: Session) -> None:
        digests = {name: split.digest for name, split in session.splits.items()}
        stored = self.run.read_json(SPLITS) or {}
        if digests | stored == digests:
            self.run.write_json(SPLITS, digests)
        else:
            raise RunConflict(
                f"{self.run.path} was begun on other tokens: the text {self.config.text!r} "
                "or the tokenizer has changed since.",
                fix="restore them, or start anew with --fresh (the earlier run is set aside).",
            )

    def _record_environment(self, session: Session) -> None:
        """Write down what this process measures with; warn where earlier measurements differ."""
        ours = measuring_on(session.loaded.device) | {"numerics": str(NUMERICS_VERSION)}
        differing = {
            f"{name} {earlier.get(name)} then, {ours[name]} now"
            for earlier in self.run.environments
            for name in ours
            if earlier.get(name) != ours[name]
        }
        if differing:
            self.observer.warn(
                f"{self.run.path} holds measurements of another environment, whose last digits may "
                f"differ: {'; '.join(sorted(differing))}. --fresh measures everything anew."
            )
        self.run.add_environment(ours)

    def _calibrate(self, session: Session) -> Calibration:
        resting = groups_with_moments(self.plan.options.choices, session.quantized.groups)
        stored = self.run.read_json(CALIBRATION)
        if stored is not None:
            calibration = Calibration.from_dict(stored)
        else:
            with self._timed("calibrate"):
                ahead = self._ahead(session)
                if resting:
                    take_along(session.scorer, session.splits["calibration"], ahead)
                calibration = calibrate_session(self.config, session, self.observer, ahead)
            self.run.write_json(CALIBRATION, calibration.to_dict())
        use_calibration(session, calibration, self.observer)
        if resting:
            with self._timed("statistics"):
                collect_statistics(session, resting, self.observer)
                share_codes(session.scorer, self.plan.options.choices)
        return calibration

    def _probe(self, session: Session) -> Sensitivity:
        with self._timed("probe"):
            sensitivity, method = self._sensitivity(session)
        self.run.write_json(SENSITIVITY, {"method": method, **sensitivity.to_dict()})
        for group, choice in sensitivity.overflowing():
            self.observer.warn(
                f"{group} in {choice} overflows: its KL is not finite, and it is taken only where "
                "the budget leaves nothing else."
            )
        return sensitivity

    def _sensitivity(self, session: Session) -> tuple[Sensitivity, str]:
        """What every open choice does alone, and how that was found out."""
        sensitivity, method = self._probes(session).measure(self.config.probe)
        return sensitivity, str(method)

    def _ahead(self, session: Session) -> Ahead | None:
        """What gradients need of the BF16 model, if it may go along with the calibration."""
        beside = session.splits["calibration"]
        return self._probes(session).ahead(self.config.probe, beside)

    def _probes(self, session: Session) -> Probes:
        return Probes(
            run=self.run,
            scorer=session.scorer,
            split=session.splits["search"],
            keys=tuple(keys_of(self.plan.options.choices)),
            seed=self.config.seed,
            observer=self.observer,
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started, before = time.monotonic(), self._work()
        memory = DeviceMemory()
        if torch.cuda.is_initialized():
            memory.begin()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
            self.run.write_json(SECONDS, self.seconds)
            peak = memory.peak() if torch.cuda.is_initialized() else None
            own = {"stage": stage, "seconds": seconds, "gpu_peak_bytes": peak}
            work = self._work().since(before)
            self.run.append(WORK, own | work.to_dict(self._stages()))

    def _work(self) -> Work:
        """What this process has taken so far."""
        session = self.shared.session
        return Work.of(None if session is None else session.scorer)

    def _stages(self) -> int:
        """Of the model, one before it is loaded."""
        session = self.shared.session
        return 1 if session is None else session.scorer.trunk.stages


def open_to_probe(
    config: ProbeConfig, plan: Plan, folder: Path, observer: Progress, ranks: Ranks
) -> Session:
    """The loaded model of a search or of probes, on this rank.

    Args:
        config: of the command.
        plan: what it names, opened.
        folder: where moments of inputs are kept, and codes that cost more to make than to read.
        observer: told of progress and shortfalls.
        ranks: the processes that batches are dealt to.

    Raises:
        SourceError: text or model missing, damaged or not understood.
        OutOfMemory: the model does not fit the device.
        ConfigError: more ranks than batches of search tokens.
    """
    choices = plan.options.choices
    groups = [group for group in plan.groups if choices[group.name] != (BF16,)]
    return open_measuring(
        config,
        plan.source,
        groups,
        cached_attention(config.kv_cache, plan.groups),
        observer,
        mode=config.mode,
        codes=code_cache(plan.source, folder),
        statistics=statistics_store(folder),
        ranks=ranks,
        work=work_bytes(config, plan.source, groups),
    )
