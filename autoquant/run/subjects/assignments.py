"""Assignments of a model, or a checkpoint of it, ready to be measured without a search."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoquant.codes.statistics_size import groups_with_moments
from autoquant.export.read_back import open_quantized
from autoquant.formats import BF16
from autoquant.formats.kv_cache import KvCache
from autoquant.measure.calibration import Calibration
from autoquant.measure.session import Session
from autoquant.model.install import groups_of, install, is_quantized
from autoquant.plan.accounting import Accounting
from autoquant.plan.assignment import Assignment, require_legal
from autoquant.plan.budget import Scope
from autoquant.plan.grouping import Groups, find_groups
from autoquant.plan.kv_cache import cache_bytes, cached_attention
from autoquant.run.config import MeasuredConfig
from autoquant.run.config.parts import LoadedConfig
from autoquant.run.measuring import (
    calibrate_session,
    collect_statistics,
    open_measuring,
    use_calibration,
)
from autoquant.run.observer import Observer
from autoquant.run.polishing import require_codes
from autoquant.run.text import with_text
from autoquant.source.source import Source


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A calibrated session, and what it can measure."""

    session: Session
    source: Source
    groups: Groups
    assignments: tuple[Assignment, ...]

    @property
    def cache(self) -> KvCache:
        """How keys and values are kept."""
        return KvCache.of(quantized=self.session.quantized.kv_cache is not None)

    def complete(self, assignment: Assignment) -> Assignment:
        """An assignment that names every group."""
        return Assignment.of({group.name: assignment[group.name] for group in self.groups})

    def bpe(self, assignment: Assignment) -> float:
        """Bits per element of the checkpoint that the assignment makes."""
        complete = self.complete(assignment)
        accounting = Accounting(
            headers=self.source.headers,
            groups=self.groups,
            choices={name: (choice, BF16) for name, choice in complete},
            added_bytes=cache_bytes(self.cache, self.groups),
        )
        return accounting.bpe(complete, Scope.CHECKPOINT)


def open_checkpoint(
    config: MeasuredConfig, source: Source, checkpoint: Path, observer: Observer
) -> Opened:
    """A checkpoint with its own dequantized weights, input scales and cache.

    Raises:
        SourceError: model, text or checkpoint missing, damaged or not matching.
    """
    exported = open_quantized(checkpoint)
    groups = groups_of(exported, source)
    quantized = [g for g in groups if is_quantized(exported, g)]
    config = with_text(config, observer)
    session = open_measuring(
        config, source, quantized, exported.attention, observer, mode=config.mode
    )
    assignment = install(exported, source, session.quantized)
    return Opened(session=session, source=source, groups=groups, assignments=(assignment,))


def open_assignments(
    config: MeasuredConfig, source: Source, assignments: Sequence[Assignment], observer: Observer
) -> Opened:
    """Assignments of a model, which is calibrated for all of them.

    Raises:
        SourceError: model or text missing or damaged.
        ConfigError: an assignment names a group or format that the model does not allow, or
            refitted codes.
    """
    groups = find_groups(source)
    for assignment in assignments:
        groups = groups_of_assignment(source, assignment)
        require_codes(assignment, None)
    quantized = [g for g in groups if any(own[g.name] != BF16 for own in assignments)]
    attention = cached_attention(config.kv_cache, groups)
    config = with_text(config, observer)
    session = open_measuring(config, source, quantized, attention, observer, mode=config.mode)
    calibrate_for(config, session, assignments, observer)
    return Opened(session=session, source=source, groups=groups, assignments=tuple(assignments))


def groups_of_assignment(source: Source, assignment: Assignment) -> Groups:
    """The groups that `assignment` speaks of, shared experts with the routed ones or apart.

    Raises:
        ConfigError: it names a group or a format that the model does not allow.
    """
    groups = find_groups(source)
    apart = find_groups(source, shared_experts="separate")
    names = {name for name, _ in assignment}
    if names - groups.by_name.keys() and names <= apart.by_name.keys():
        groups = apart
    require_legal(assignment, groups)
    return groups


def calibrate_for(
    config: LoadedConfig, session: Session, assignments: Sequence[Assignment], observer: Observer
) -> Calibration:
    """Calibrate a session, with all that codes of the assignments rest on."""
    found = calibrate_session(config, session, observer)
    use_calibration(session, found, observer)
    collect_for(session, assignments, observer)
    return found


def collect_for(session: Session, assignments: Sequence[Assignment], observer: Observer) -> None:
    """Collect the moments that codes of the assignments rest on, as far as they are not kept."""
    groups = session.quantized.groups
    choices = {g.name: tuple(dict.fromkeys(own[g.name] for own in assignments)) for g in groups}
    collect_statistics(session, groups_with_moments(choices, groups), observer)
