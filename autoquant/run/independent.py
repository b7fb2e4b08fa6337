"""An export run by independent eyes: what it is held against, and whether that can be done."""

from pathlib import Path

import torch

from autoquant.data.tokens import Split
from autoquant.errors import AutoQuantError, SourceError, first_line
from autoquant.formats.kv_cache import KvCache
from autoquant.independent.forward import Agreement, Evidence, run_checkpoint
from autoquant.measure.session import Session
from autoquant.model.streaming.placement import free_host_bytes
from autoquant.plan.assignment import Assignment
from autoquant.progress import Progress
from autoquant.source.source import Source
from autoquant.source.tensors import read_tensor

SEQUENCES, LENGTH = 16, 128
"""Sequences, and tokens of each, that a checkpoint is run on."""

_MODELS = 3
"""Memory of a run in models: one at a time, its weights as they are read, and logits."""


def make_evidence(session: Session, assignment: Assignment, split: Split) -> Evidence:
    """What scoring says of an assignment on the first tokens of a split."""
    length = min(LENGTH, *(batch.shape[1] for batch in split.batches))
    rows = torch.cat([batch[:, :length] for batch in split.batches])[:SEQUENCES]
    own = Split.unrelated("forward", (rows,), digest=f"{split.digest}-forward")
    (scores,) = session.scorer.score_fully([assignment], own)
    session.scorer.forget(own)
    return Evidence(
        sequences=tuple(map(tuple, rows.tolist())),
        kl=tuple(scores.by_sequence().tolist()),
        activation_mode=str(session.quantized.mode),
        kv_cache=str(KvCache.of(quantized=session.quantized.kv_cache is not None)),
    )


def check_by_forward(
    checkpoint: Path, source: Source, evidence: Evidence, device: torch.device
) -> Agreement:
    """Run a checkpoint and its source by transformers' own model.

    Raises:
        SourceError: an FP8 cache, or a model that transformers cannot load or run.
    """
    if KvCache(evidence.kv_cache).is_quantized:
        raise SourceError(
            f"{checkpoint} keeps keys and values in {evidence.kv_cache.upper()}, which "
            "transformers' own forward does not.",
            fix="leave --forward out, or export without --kv-cache to check the weights.",
        )
    is_coded = any(header.scales is not None for header in source.headers)
    weights = (
        {header.name: read_tensor(header) for header in source.headers.to_write(())}
        if is_coded
        else None
    )
    try:
        return run_checkpoint(checkpoint, source.path, evidence, device=device, weights=weights)
    except AutoQuantError:
        raise
    except Exception as error:  # model code raises anything, memory that is missing too
        line = first_line(error)
        raise SourceError(
            f"transformers' own forward of {checkpoint} or its source fails: {line}",
            fix="leave --forward out.",
        ) from error


def check_export(
    checkpoint: Path, source: Source, evidence: Evidence, device: torch.device, observer: Progress
) -> Agreement | None:
    """The same right after an export, where it can be done; a note says where not.

    Raises:
        SourceError: the two forwards disagree.
    """
    needed = _MODELS * source.headers.bytes
    if (free := _free_bytes(device)) < needed:
        observer.note(
            f"not run by transformers' own forward: that takes some {needed:,} bytes, and "
            f"{free:,} are free. `autoquant verify --forward` does it elsewhere."
        )
        return None
    observer.stage("forward", 1)
    try:
        found = check_by_forward(checkpoint, source, evidence, device)
    except SourceError as error:
        observer.note(f"not run by transformers' own forward: {error.message}")
        return None
    observer.step()
    if found.note is not None:
        observer.note(found.note)
    require_agreement(checkpoint, found)
    return found


def require_agreement(checkpoint: Path, found: Agreement) -> None:
    """Return if a checkpoint computes what was measured.

    Raises:
        SourceError: it does not.
    """
    if found.problem is not None:
        raise SourceError(
            f"{checkpoint} does not compute what was measured: {found.problem}",
            fix="this is a fault of AutoQuant or of transformers: report the architecture, and do "
            "not serve the checkpoint.",
        )


def _free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
