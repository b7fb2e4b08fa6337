"""One assignment without a search: its KL, its checkpoint, or the KL of that checkpoint."""

from pathlib import Path
from typing import Any

from autoquant.codes.statistics_size import groups_with_moments
from autoquant.data.tokenizer import require_tokenizer
from autoquant.export.companions import left_out_note
from autoquant.export.declaration import quantized_linears, reader_warnings
from autoquant.export.export import ExportResult, export
from autoquant.export.layouts.recipe import modelopt_recipe
from autoquant.export.read_back import open_quantized
from autoquant.export.target import require_free
from autoquant.files import write_atomic
from autoquant.formats import BF16
from autoquant.formats.kv_cache import KvCache
from autoquant.measure.calibration import Calibration, read_calibration
from autoquant.measure.session import Session
from autoquant.model.install import groups_of, install, is_quantized
from autoquant.model.memory import keep_freed_memory
from autoquant.plan.accounting import Accounting
from autoquant.plan.assignment import Assignment, require_legal
from autoquant.plan.budget import Scope
from autoquant.plan.grouping import Groups, find_groups
from autoquant.plan.kv_cache import cache_bytes, cached_attention
from autoquant.progress import Unit
from autoquant.run.config import ExportConfig, ScoreConfig
from autoquant.run.config.parts import LoadedConfig
from autoquant.run.independent import check_export, make_evidence
from autoquant.run.measuring import (
    book_of_run,
    calibrate_session,
    collect_statistics,
    open_measuring,
    use_calibration,
)
from autoquant.run.observer import Observer
from autoquant.run.opening import open_model
from autoquant.run.text import with_text
from autoquant.source.source import Source


def score(config: ScoreConfig, observer: Observer) -> dict[str, Any]:
    """Measure an assignment of the model, or a checkpoint exported from it.

    A checkpoint is measured with its own dequantized weights, its own input scales and the cache
    that it has scales for; an assignment is calibrated first.

    Returns:
        KL statistics in nats per token, agreement, perplexities, BPE and tokens.

    Raises:
        SourceError: model, text or checkpoint missing, damaged or not matching.
        ConfigError: the assignment names a group or format that the model does not allow.
    """
    source, mode = open_model(config), config.mode
    config = with_text(config, observer)
    if config.checkpoint is not None:
        exported = open_quantized(config.checkpoint)
        groups = groups_of(exported, source)
        quantized = [g for g in groups if is_quantized(exported, g)]
        session = open_measuring(config, source, quantized, exported.attention, observer, mode=mode)
        assignment = install(exported, source, session.quantized)
    else:
        assert config.assignment is not None
        assignment = Assignment.read(config.assignment)
        groups = _groups_of(source, assignment)
        quantized = [g for g in groups if assignment[g.name] != BF16]
        attention = cached_attention(config.kv_cache, groups)
        session = open_measuring(config, source, quantized, attention, observer, mode=mode)
        _calibrate(config, session, assignment, observer)
    cache = KvCache.of(quantized=session.quantized.kv_cache is not None)
    return _measure(session, groups, source, assignment, cache, config.split, observer) | {
        "model": source.model,
        "checkpoint": str(config.checkpoint) if config.checkpoint is not None else None,
        "target": str(config.served_by),
        "activation_mode": str(mode),
        "kv_cache": str(cache),
    }


def export_single(config: ExportConfig, observer: Observer) -> ExportResult | None:
    """Write the model under an assignment: a checkpoint, a ModelOpt recipe, or both.

    Returns:
        The checkpoint, if one was asked for.

    Raises:
        SourceError: model, text or `calibrated` missing, damaged or not understood.
        ConfigError: the assignment names a group or format that the model does not allow, the model
            has no such cache, or a file cannot be written.
        RunConflict: `out` holds something.
    """
    source = open_model(config, weights=config.out is not None)
    assignment = Assignment.read(config.assignment)
    if config.modelopt_recipe is not None:
        _write_recipe(source, assignment, config.kv_cache, config.modelopt_recipe)
    if config.out is None:
        return None
    return _export(config, source, assignment, config.out, observer)


def _export(
    config: ExportConfig,
    source: Source,
    assignment: Assignment,
    target: Path,
    observer: Observer,
) -> ExportResult:
    require_free(target, source=source.path)
    groups = _groups_of(source, assignment)
    quantized = [g for g in groups if assignment[g.name] != BF16]
    attention = cached_attention(config.kv_cache, groups)
    if config.calibrated is not None:
        require_tokenizer(source.path)
        keep_freed_memory()
        found = read_calibration(config.calibrated, quantized, attention)
        book = book_of_run(source, config.calibrated.parent)
        evidence = None
    else:
        config = with_text(config, observer)
        session = open_measuring(config, source, quantized, attention, observer)
        found = _calibrate(config, session, assignment, observer)
        book = session.book_of_export(source)
        evidence = make_evidence(session, assignment, session.splits["calibration"])
    for warning in reader_warnings(config.layout, groups, assignment):
        observer.warn(warning)
    source.contents.digests(observer)
    observer.stage("export", source.headers.bytes, Unit.BYTES)
    result = export(
        source,
        groups,
        assignment,
        found.ranges(),
        target,
        layout=config.layout,
        kv_ranges=found.kv_ranges,
        uncalibrated=found.unseen,
        book=book,
        evidence=None if evidence is None else evidence.to_dict(),
        on_bytes=observer.step,
    )
    if evidence is not None:
        check_export(result.path, source, evidence, session.loaded.device, observer)
    if (note := left_out_note(result.left_out)) is not None:
        observer.note(note)
    return result


def _write_recipe(source: Source, assignment: Assignment, kv_cache: KvCache, file: Path) -> None:
    import yaml

    from autoquant.report.html import writing

    groups = _groups_of(source, assignment)
    cached_attention(kv_cache, groups)
    recipe = modelopt_recipe(quantized_linears(groups, assignment), kv_cache)
    with writing(file):
        write_atomic(file, yaml.safe_dump(recipe, sort_keys=False))


def _groups_of(source: Source, assignment: Assignment) -> Groups:
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


def _calibrate(
    config: LoadedConfig, session: Session, assignment: Assignment, observer: Observer
) -> Calibration:
    found = calibrate_session(config, session, observer)
    use_calibration(session, found, observer)
    groups = session.quantized.groups
    choices = {group.name: (assignment[group.name],) for group in groups}
    collect_statistics(session, groups_with_moments(choices, groups), observer)
    return found


def _measure(
    session: Session,
    groups: Groups,
    source: Source,
    assignment: Assignment,
    cache: KvCache,
    name: str,
    observer: Observer,
) -> dict[str, Any]:
    split = session.splits[name]
    if (caution := split.caution()) is not None:
        observer.warn(caution)
    observer.stage("score", 1)
    (scores,) = session.scorer.score_fully([assignment], split)
    observer.step()
    complete = {group.name: assignment[group.name] for group in groups}
    accounting = Accounting(
        headers=source.headers,
        groups=groups,
        choices={n: (c, BF16) for n, c in complete.items()},
        added_bytes=cache_bytes(cache, groups),
    )
    return {
        "kl": scores.summary(),
        "top1_agreement": scores.top1_agreement(),
        "perplexity": scores.perplexity(),
        "bpe": accounting.bpe(Assignment.of(complete), Scope.CHECKPOINT),
        "counts": Assignment.of(complete).counts(),
        "split": {
            "name": name,
            "tokens": split.tokens,
            "unit": str(split.unit),
            "units": split.unit_count,
            "digest": split.digest,
        },
    }
