"""One assignment without a search: its KL, its checkpoint, or the KL of that checkpoint."""

from pathlib import Path
from typing import Any

from autoquant.data.tokenizer import require_tokenizer
from autoquant.export.companions import left_out_note
from autoquant.export.declaration import quantized_linears, reader_warnings
from autoquant.export.export import ExportResult, export
from autoquant.export.layouts.recipe import modelopt_recipe
from autoquant.export.target import require_free
from autoquant.files import write_atomic
from autoquant.formats import BF16
from autoquant.formats.kv_cache import KvCache
from autoquant.measure.calibration import read_calibration
from autoquant.model.memory import keep_freed_memory
from autoquant.plan.assignment import Assignment
from autoquant.plan.kv_cache import cached_attention
from autoquant.plan.plan import loading_warnings, refused_by
from autoquant.progress import Unit
from autoquant.run.by_token.positions import describe_positions
from autoquant.run.config import ExportConfig, ScoreConfig
from autoquant.run.independent import check_export, make_evidence
from autoquant.run.measuring import book_of_run, open_measuring
from autoquant.run.observer import Observer
from autoquant.run.opening import open_model
from autoquant.run.polishing import require_codes
from autoquant.run.subjects.assignments import (
    Opened,
    calibrate_for,
    groups_of_assignment,
    open_assignments,
    open_checkpoint,
)
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
    source = open_model(config)
    if config.checkpoint is not None:
        opened = open_checkpoint(config, source, config.checkpoint, observer)
    else:
        assert config.assignment is not None
        opened = open_assignments(config, source, [Assignment.read(config.assignment)], observer)
    return _measure(opened, opened.assignments[0], config, observer) | {
        "model": source.model,
        "checkpoint": str(config.checkpoint) if config.checkpoint is not None else None,
        "target": str(config.served_by),
        "activation_mode": str(config.mode),
        "kv_cache": str(opened.cache),
    }


def export_single(config: ExportConfig, observer: Observer) -> ExportResult | None:
    """Write the model under an assignment: a checkpoint, a ModelOpt recipe, or both.

    Returns:
        The checkpoint, if one was asked for.

    Raises:
        SourceError: model, text or `calibrated` missing, damaged or not understood.
        ConfigError: the assignment names a group or format that the model does not allow, or
            refitted codes that are not there, the model has no such cache, or a file cannot be
            written.
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
    groups = groups_of_assignment(source, assignment)
    require_codes(assignment, None if config.calibrated is None else config.calibrated.parent)
    quantized = [g for g in groups if assignment[g.name] != BF16]
    attention = cached_attention(config.kv_cache, groups)
    refused = refused_by(source.config, groups, assignment.quantized)
    for warning in loading_warnings(refused, config.layout):
        observer.warn(warning)
    if config.calibrated is not None:
        require_tokenizer(source.path)
        keep_freed_memory()
        found = read_calibration(config.calibrated, quantized, attention)
        book = book_of_run(source, config.calibrated.parent)
        evidence = None
    else:
        config = with_text(config, observer)
        session = open_measuring(config, source, quantized, attention, observer)
        found = calibrate_for(config, session, [assignment], observer)
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

    groups = groups_of_assignment(source, assignment)
    cached_attention(kv_cache, groups)
    recipe = modelopt_recipe(quantized_linears(groups, assignment), kv_cache)
    with writing(file):
        write_atomic(file, yaml.safe_dump(recipe, sort_keys=False))


def _measure(
    opened: Opened, assignment: Assignment, config: ScoreConfig, observer: Observer
) -> dict[str, Any]:
    session, name = opened.session, config.split
    split = session.splits[name]
    if (caution := split.caution()) is not None:
        observer.warn(caution)
    observer.stage("score", 1)
    (scores,) = session.scorer.score_fully([assignment], split)
    observer.step()
    return {
        "kl": scores.summary(),
        "top1_agreement": scores.top1_agreement(),
        "perplexity": scores.perplexity(),
        "bpe": opened.bpe(assignment),
        "counts": opened.complete(assignment).counts(),
        "split": {
            "name": name,
            "tokens": split.tokens,
            "unit": str(split.unit),
            "units": split.unit_count,
            "digest": split.digest,
        },
        **(
            {"by_position": describe_positions({"the assignment": scores})}
            if config.report_by
            else {}
        ),
    }
