"""From a model to its copy with channels of like size."""

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoquant.equalize.channels import final_states, powers_of, seen_channels
from autoquant.equalize.config import EqualizeConfig
from autoquant.equalize.copy import new_copy
from autoquant.equalize.sites import Part, find_sites
from autoquant.errors import ConfigError, SourceError
from autoquant.export.target import require_free
from autoquant.plan.grouping import find_groups
from autoquant.plan.linears import LayerGroup
from autoquant.run.measuring import open_measuring
from autoquant.run.observer import Observer
from autoquant.run.opening import open_model
from autoquant.run.text import with_text
from autoquant.source.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalized:
    """A copy of a model that computes the same."""

    path: Path
    sites: int
    """Norms and up projections whose channels were looked at."""
    channels: int
    """All of theirs."""
    scaled: int
    """Those that have another size now."""


def equalize(config: EqualizeConfig, observer: Observer) -> Equalized:
    """Write a copy of a model whose channels are of like size, and check that it computes the same.

    Raises:
        SourceError: model or text missing, damaged or not understood; a tensor cannot be scaled
            without loss; or the copy computes something else.
        ConfigError: the model stores weights in another form, or has no such channels, or the
            folder cannot be written.
        RunConflict: the folder holds something.
    """
    source = open_model(config)
    require_free(config.out, source=source.path)
    _require_plain(source)
    groups = _open_groups(source)
    parts = [*Part] if config.parts is None else config.parts
    sites = [own for own in find_sites(source.headers.tensors, groups) if own.part in parts]
    if not sites:
        raise ConfigError(
            f"{source.model} has no channels that could be scaled: none of its norms and up "
            "projections is known to be read by products alone.",
            fix="search the model as it is.",
        )
    config = with_text(config, observer)
    session = open_measuring(config, source, groups, (), observer)
    split = session.splits["calibration"]
    observer.stage("channels", session.scorer.trunk.stages)
    seen = seen_channels(session.scorer, split, groups, observer.step)
    hidden = final_states(session.scorer, split)
    del session
    gc.collect()  # the copy is loaded where the model was
    powers = [powers_of(site, seen, config.strength) for site in sites]
    said = {
        "made_from": {"model": source.model, "digest": source.digest},
        "strength": config.strength,
        "calibration": {"text": config.text, "tokens": split.tokens, "digest": split.digest},
    }
    with new_copy(config.out, source, sites, powers, said, observer) as folder:
        _require_same(folder, config, hidden, observer)
    return Equalized(
        path=config.out,
        sites=len(sites),
        channels=sum(site.channels for site in sites),
        scaled=sum(int(own.count_nonzero()) for own in powers),
    )


def _open_groups(source: Source) -> list[LayerGroup]:
    return [group for group in find_groups(source) if not group.closed]


def _require_plain(source: Source) -> None:
    other = next((tensor for tensor in source.headers if not tensor.is_plain), None)
    if other is not None:
        raise ConfigError(
            f"{source.model} stores {other.name} in another form than BF16 "
            f"({other.stored_dtype or 'as a part of a larger tensor'}), and a copy keeps how "
            "tensors are stored.",
            fix="search the model as it is, or save it in BF16 first.",
        )


def _require_same(folder: Path, config: EqualizeConfig, hidden: Tensor, observer: Observer) -> None:
    """Raise SourceError unless the copy gives the same final hidden states, bit by bit."""
    copy = open_model(config.model_copy(update={"model": str(folder), "revision": None}))
    session = open_measuring(config, copy, _open_groups(copy), (), observer)
    if not torch.equal(final_states(session.scorer, session.splits["calibration"]), hidden):
        raise SourceError(
            f"a copy of {config.model} with scaled channels computes something else: not all that "
            "reads them is known here. Nothing was written.",
            fix="leave parts out with --parts, or search the model as it is.",
        )
