"""A checkpoint measured for its receipt: from a command's settings, or from another receipt's."""

import math
import platform
import sys
from pathlib import Path

import autoquant
from autoquant.data.tokens import FEWEST_UNITS
from autoquant.environment import git_commit, package_versions
from autoquant.errors import ConfigError, SourceError
from autoquant.export.companions import AUTOQUANT_FILE
from autoquant.export.layouts.modelopt import QUANTIZATION_FILE
from autoquant.export.read_back import QuantizedCheckpoint, open_quantized
from autoquant.measure.kl import TokenScores
from autoquant.report.record import RunRecord
from autoquant.run.config import MeasuredConfig, ReceiptConfig
from autoquant.run.observer import Observer
from autoquant.run.receipts.receipt import (
    CONFIDENCE,
    DIRECTION,
    POSITIONS,
    UNIT,
    CheckpointFacts,
    CodeFacts,
    KlFacts,
    Receipt,
    Settings,
    SourceFacts,
    TokenFacts,
    digest_of_code,
)
from autoquant.run.subjects.assignments import Opened, open_checkpoint
from autoquant.run.subjects.finished import config_of, placing
from autoquant.run.subjects.source import source_of
from autoquant.source.contents import file_digests
from autoquant.source.source import CONFIG_FILE, Source
from autoquant.store.run_directory import CHECKPOINT, IDENTITY

PACKAGES = ("torch", "transformers", "numpy", "safetensors")

_DECLARATIONS = (CONFIG_FILE, QUANTIZATION_FILE)
"""What engines read of a checkpoint besides its weights."""


def make_receipt(config: ReceiptConfig, observer: Observer) -> tuple[Receipt, Path]:
    """Measure a checkpoint on the tokens of its run, or on those of the settings.

    Returns:
        The receipt, and the checkpoint.

    Raises:
        ConfigError: a run without a checkpoint, or a checkpoint whose model nothing names.
        SourceError: model, text or checkpoint missing, damaged or not matching.
    """
    folder = _named(config)
    if (folder / IDENTITY).is_file():
        checkpoint = folder / CHECKPOINT
        if not (checkpoint / AUTOQUANT_FILE).is_file():
            raise ConfigError(
                f"{folder} holds no checkpoint, whose files a receipt is of.",
                fix="export it: repeat the search with --export.",
            )
        settings = config_of(RunRecord.read(folder))
        terms = MeasuredConfig.of(
            {name: getattr(settings, name) for name in MeasuredConfig.model_fields} | here(config)
        )
    else:
        checkpoint, terms = folder, config
    source = source_of(checkpoint, config.source, config.revision)
    return measured(checkpoint, source, terms, observer), checkpoint


def _named(config: ReceiptConfig) -> Path:
    if config.model is None:
        raise ConfigError(
            "a receipt is of a run directory or of a checkpoint, and none is named.",
            fix="write `autoquant receipt RUN`, or `autoquant receipt --check FILE`.",
        )
    return Path(config.model)


def here(config: ReceiptConfig) -> dict[str, object]:
    """Settings of this machine, which no result depends on, as far as they are given."""
    return placing(config) | {"trust_remote_code": config.trust_remote_code}


def measured(
    checkpoint: Path, source: Source, config: MeasuredConfig, observer: Observer
) -> Receipt:
    """The receipt of a checkpoint by the files and the model that are here now.

    Every file is read, whatever is remembered of it.

    Raises:
        SourceError: model, text or checkpoint missing, damaged or not matching.
    """
    observer.stage("hash", 2)
    files = file_digests(source.headers.files)
    observer.step()
    exported = open_quantized(checkpoint)
    stored = _checkpoint_files(exported)
    observer.step()
    opened = open_checkpoint(config, source, checkpoint, observer)
    (assignment,) = opened.assignments
    split = opened.session.splits["report"]
    if split.unit_count < FEWEST_UNITS:
        raise SourceError(
            f"the report tokens are from {split.unit_count} {split.unit}s: an interval needs "
            f"{FEWEST_UNITS}.",
            fix="pass text of more documents, or more --report-tokens.",
        )
    if (caution := split.caution()) is not None:
        observer.warn(caution)
    observer.stage("score", 1)
    (scores,) = opened.session.scorer.score_fully([assignment], split, with_noise=True)
    observer.step()
    noise = opened.session.scorer.noise(split).mean
    if not math.isfinite(scores.mean + noise):
        raise SourceError(
            f"{checkpoint} has no finite KL and noise floor on these tokens: the model or the "
            "checkpoint overflows in BF16.",
            fix="a receipt needs both; measure on other text, or repair the model.",
        )
    return Receipt(
        source=SourceFacts(
            model=source.model, revision=source.revision, digest=source.digest, files=files
        ),
        checkpoint=_facts_of(opened, stored, exported),
        tokens=TokenFacts(
            digest=split.digest,
            tokens=split.tokens,
            sequences=split.sequences,
            unit=str(split.unit),
            units=split.unit_count,
        ),
        kl=_kl_facts(scores, noise, config.seed),
        settings=_settings(config, opened),
        code=CodeFacts(
            autoquant=autoquant.__version__, commit=git_commit(), digest=digest_of_code()
        ),
        versions=package_versions(PACKAGES),
        python=sys.version.split()[0],
        machine=f"{platform.system()} {platform.machine()}",
        device=str(opened.session.loaded.device),
    )


def _checkpoint_files(exported: QuantizedCheckpoint) -> dict[str, str]:
    declared = (exported.path / name for name in _DECLARATIONS)
    return file_digests([*exported.headers.files, *(file for file in declared if file.exists())])


def _facts_of(
    opened: Opened, files: dict[str, str], exported: QuantizedCheckpoint
) -> CheckpointFacts:
    (assignment,) = opened.assignments
    size = exported.headers.bytes
    return CheckpointFacts(
        files=files,
        assignment=assignment.digest,
        counts=opened.complete(assignment).counts(),
        checkpoint_bytes=size,
        bpe=8 * size / opened.source.headers.elements,
    )


def _kl_facts(scores: TokenScores, noise: float, seed: int) -> KlFacts:
    low, high = scores.by_unit().interval((1 - CONFIDENCE) / 2, seed=seed)
    return KlFacts(
        direction=DIRECTION,
        positions=POSITIONS,
        unit=UNIT,
        mean=scores.mean,
        stderr=scores.stderr(),
        confidence=CONFIDENCE,
        low=low,
        high=high,
        noise_floor=noise,
        top1_agreement=scores.top1_agreement(),
    )


def _settings(config: MeasuredConfig, opened: Opened) -> Settings:
    return Settings(
        calibration=config.text,
        seed=config.seed,
        sequence_length=config.longest,
        batch_tokens=config.batch_tokens,
        calibration_tokens=config.calibration_tokens,
        search_tokens=config.search_tokens,
        report_tokens=config.report_tokens,
        calibrate_all_experts=config.calibrate_all_experts,
        target=str(config.served_by),
        kv_cache=str(opened.cache),
    )
