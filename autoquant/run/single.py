"""One assignment without a search: its KL, its checkpoint, or the KL of that checkpoint."""

from pathlib import Path
from typing import Any

from autoquant.data.tokens import TokenPlan
from autoquant.export.declaration import quantized_linears, reader_warnings
from autoquant.export.export import ExportResult, export
from autoquant.export.layouts.base import Layout
from autoquant.export.layouts.recipe import modelopt_recipe
from autoquant.export.read_back import open_quantized
from autoquant.export.target import require_free
from autoquant.files import write_atomic
from autoquant.formats import BF16
from autoquant.measure.calibration import Calibration, calibrate, read_calibration
from autoquant.measure.session import Session, open_session
from autoquant.model.inputs import ActivationMode
from autoquant.model.install import groups_of, install, is_quantized
from autoquant.model.memory import keep_freed_memory
from autoquant.plan.accounting import Accounting
from autoquant.plan.assignment import Assignment, require_legal
from autoquant.plan.budget import Scope
from autoquant.plan.grouping import Groups, find_groups
from autoquant.plan.kv_cache import KvCache
from autoquant.progress import Unit
from autoquant.run.observer import Observer
from autoquant.source.source import Source


def score(
    source: Source,
    *,
    assignment: Assignment | None,
    checkpoint: Path | None,
    split: str,
    calibration: str,
    tokens: TokenPlan,
    mode: ActivationMode,
    kv_cache: KvCache = KvCache.BF16,
    device: str | None,
    trust_remote_code: bool,
    observer: Observer,
) -> dict[str, Any]:
    """Measure an assignment of `source`, or a checkpoint exported from it.

    Exactly one of `assignment` and `checkpoint` is given. A checkpoint is measured with its own
    dequantized weights, its own input scales and the cache that it has scales for; an assignment is
    calibrated first.

    Returns:
        KL statistics in nats per token, agreement, perplexities, BPE and tokens.

    Raises:
        SourceError: model, text or checkpoint missing, damaged or not matching.
        ConfigError: the assignment names a group or format that the model does not allow.
    """
    exported = open_quantized(checkpoint) if checkpoint is not None else None
    if exported is not None:
        groups = groups_of(exported, source)
        quantized = [g for g in groups if is_quantized(exported, g)]
        attention = exported.attention
    else:
        assert assignment is not None
        groups = _groups_of(source, assignment)
        quantized = [g for g in groups if assignment[g.name] != BF16]
        attention = kv_cache.attention(groups)
    session = open_session(
        source,
        quantized,
        attention=attention,
        calibration=calibration,
        tokens=tokens,
        mode=mode,
        device=device,
        trust_remote_code=trust_remote_code,
        observer=observer,
    )
    if exported is not None:
        assignment = install(exported, source, session.quantized)
    else:
        _calibrate(session, tokens, observer)
    assert assignment is not None
    return _measure(session, groups, source, assignment, split, observer) | {
        "model": source.model,
        "checkpoint": str(checkpoint) if checkpoint is not None else None,
        "activation_mode": str(mode),
        "kv_cache": str(KvCache.of(quantized=bool(attention))),
    }


def export_assignment(
    source: Source,
    assignment: Assignment,
    target: Path,
    *,
    layout: Layout = Layout.MODELOPT,
    kv_cache: KvCache = KvCache.BF16,
    calibration: str,
    tokens: TokenPlan,
    device: str | None,
    trust_remote_code: bool,
    calibrated: Path | None = None,
    observer: Observer,
) -> ExportResult:
    """Calibrate the input scales of `source` and write it under `assignment` to `target`.

    Args:
        calibrated: `calibration.json` of a search; its ranges are taken then, no text is read and
            the model is not loaded.

    Raises:
        SourceError: model, text or `calibrated` missing, damaged or not understood.
        ConfigError: the assignment names a group or format that the model does not allow.
        RunConflict: `target` holds something.
    """
    require_free(target, source=source.path)
    groups = _groups_of(source, assignment)
    quantized = [g for g in groups if assignment[g.name] != BF16]
    attention = kv_cache.attention(groups)
    if calibrated is not None:
        keep_freed_memory()
        found, book = read_calibration(calibrated, quantized, attention), None
    else:
        session = open_session(
            source,
            quantized,
            attention=attention,
            calibration=calibration,
            tokens=tokens,
            mode=ActivationMode.W4A4,
            device=device,
            trust_remote_code=trust_remote_code,
            observer=observer,
        )
        found, book = _calibrate(session, tokens, observer), session.quantized.book
    for warning in reader_warnings(layout, groups, assignment):
        observer.warn(warning)
    source.contents.digests(observer)
    observer.stage("export", source.headers.bytes, Unit.BYTES)
    return export(
        source,
        groups,
        assignment,
        found.input_amax,
        target,
        layout=layout,
        kv_ranges=found.kv_ranges,
        uncalibrated=found.unseen,
        book=book,
        on_bytes=observer.step,
    )


def write_recipe(source: Source, assignment: Assignment, kv_cache: KvCache, file: Path) -> None:
    """Write the formats of `assignment` as a ModelOpt recipe, YAML.

    Raises:
        ConfigError: the assignment names a group or format that the model does not allow, the model
            has no such cache, or the file cannot be written.
    """
    import yaml

    from autoquant.report.html import writing

    groups = _groups_of(source, assignment)
    kv_cache.attention(groups)
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


def _calibrate(session: Session, tokens: TokenPlan, observer: Observer) -> Calibration:
    split = session.splits["calibration"]
    observer.stage("calibrate", len(split.batches))
    calibration = calibrate(session.scorer, split, observer.step, all_experts=tokens.all_experts)
    if (warning := calibration.warning()) is not None:
        observer.warn(warning)
    session.quantized.set_input_scales(calibration.scales())
    if session.quantized.kv_cache is not None:
        session.quantized.kv_cache.set_ranges(calibration.kv_ranges)
    return calibration


def _measure(
    session: Session,
    groups: Groups,
    source: Source,
    assignment: Assignment,
    name: str,
    observer: Observer,
) -> dict[str, Any]:
    split = session.splits[name]
    if (caution := split.caution()) is not None:
        observer.warn(caution)
    observer.stage("score", 1)
    scores = session.scorer.score_fully(assignment, split)
    observer.step()
    complete = {group.name: assignment[group.name] for group in groups}
    accounting = Accounting(
        headers=source.headers,
        groups=groups,
        choices={n: (c, BF16) for n, c in complete.items()},
        added_bytes=KvCache.of(quantized=session.quantized.kv_cache is not None).stored_bytes(
            groups
        ),
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
