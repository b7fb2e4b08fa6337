"""A receipt held against what is here: every file read again, the KL measured again."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autoquant.errors import ConfigError, SourceError
from autoquant.export.companions import AUTOQUANT_FILE
from autoquant.run.config import MeasuredConfig, ReceiptConfig
from autoquant.run.observer import Observer
from autoquant.run.receipts.making import here, measured
from autoquant.run.receipts.receipt import CodeFacts, KlFacts, Part, Receipt, differences
from autoquant.run.subjects.source import source_of
from autoquant.store.run_directory import CHECKPOINT, IDENTITY

SLACK = 0.03
"""Part of a KL by which right measurements on two machines may differ, whatever the noise."""

_NOISE_FACTOR = 4.0
"""By how much noise floors of two machines may differ: kernels sum in other orders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One part of a receipt beside what was found."""

    part: str
    said: str
    found: str
    holds: bool
    is_note: bool = False
    """Whether the part does not decide: other code and versions may measure the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A receipt that was measured again."""

    receipt: Receipt
    again: Receipt
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks if not check.is_note)


def check_receipt(config: ReceiptConfig, file: Path, observer: Observer) -> Checked:
    """Measure again what a receipt says, with its own settings.

    Args:
        config: names the checkpoint and its model, where they do not lie beside the receipt, the
            text where it is elsewhere, and the device.
        file: the receipt.
        observer: told of progress.

    Raises:
        ConfigError: the checkpoint or its model is not found.
        SourceError: the receipt, model, text or checkpoint is missing or damaged, or the checkpoint
            is not of this model.
    """
    receipt = Receipt.read(file)
    checkpoint = _checkpoint_of(config, file)
    named = config.source or _source_said(checkpoint, receipt)
    source = source_of(checkpoint, named, config.revision)
    settings = receipt.settings.model_dump(exclude={"kv_cache"})
    given = {} if config.calibration is None else {"calibration": config.calibration}
    terms = MeasuredConfig.of(settings | given | here(config))
    again = measured(checkpoint, source, terms, observer)
    return Checked(receipt=receipt, again=again, checks=tuple(compare(receipt, again)))


def require_hold(checked: Checked, file: Path) -> None:
    """Return if a receipt holds.

    Raises:
        SourceError: it does not.
    """
    wrong = [check.part for check in checked.checks if not check.holds and not check.is_note]
    if wrong:
        raise SourceError(
            f"{file} does not hold: {', '.join(wrong)}.",
            fix="compare the files with where they come from; do not trust the figures.",
        )


def _checkpoint_of(config: ReceiptConfig, file: Path) -> Path:
    """The checkpoint that is named, or that lies beside the receipt."""
    if config.model is not None:
        named = Path(config.model)
        return named / CHECKPOINT if (named / IDENTITY).is_file() else named
    for folder in (file.parent, file.parent / CHECKPOINT):
        if (folder / AUTOQUANT_FILE).is_file():
            return folder
    raise ConfigError(
        f"beside {file} lies no checkpoint.",
        fix="name it: `autoquant receipt CHECKPOINT --check FILE`.",
    )


def _source_said(checkpoint: Path, receipt: Receipt) -> str | None:
    """The model as the receipt names it, unless the checkpoint lies in its run directory."""
    return None if (checkpoint.resolve().parent / IDENTITY).is_file() else receipt.source.model


def compare(said: Receipt, found: Receipt) -> Iterator[Check]:
    """Hold every part of a receipt against one that was measured here."""
    for name in ("source", "checkpoint", "tokens"):
        yield from _equal(name, getattr(said, name), getattr(found, name))
    yield from _equal("settings", said.settings, found.settings, leave=("calibration",))
    yield from _kl(said.kl, found.kl)
    yield from _code(said.code, found.code)
    for name in ("versions", "python", "machine", "device"):
        ours, theirs = getattr(said, name), getattr(found, name)
        yield Check(
            part=name, said=str(ours), found=str(theirs), holds=ours == theirs, is_note=True
        )


def _equal(part: str, said: Part, found: Part, leave: tuple[str, ...] = ()) -> Iterator[Check]:
    """Values that are the same or wrong; where a model or a text lies is its owner's matter."""
    left = {*leave, *(("model", "revision") if part == "source" else ())}
    differing = [name for name in differences(said, found) if name not in left]
    ours, theirs = said.model_dump(), found.model_dump()
    yield Check(
        part=part if not differing else f"{part} ({', '.join(differing)})",
        said=", ".join(f"{ours[name]}" for name in differing) or "as here",
        found=", ".join(f"{theirs[name]}" for name in differing) or "the same",
        holds=not differing,
    )


def _kl(said: KlFacts, found: KlFacts) -> Iterator[Check]:
    """Figures within what machines differ by; the noise floor bounds itself by a factor alone."""
    allowed = found.noise_floor + SLACK * found.mean
    for name in ("mean", "stderr", "low", "high"):
        ours, theirs = float(getattr(said, name)), float(getattr(found, name))
        within = ours == theirs or abs(ours - theirs) <= allowed
        yield Check(part=f"KL {name}", said=f"{ours:.6g}", found=f"{theirs:.6g}", holds=within)
    least, most = sorted((said.noise_floor, found.noise_floor))
    yield Check(
        part="noise floor",
        said=f"{said.noise_floor:.3g}",
        found=f"{found.noise_floor:.3g}",
        holds=least >= 0 and (most == least or most <= _NOISE_FACTOR * least),
    )
    yield Check(
        part="top-1 agreement",
        said=f"{said.top1_agreement:.4f}",
        found=f"{found.top1_agreement:.4f}",
        holds=math.isclose(said.top1_agreement, found.top1_agreement, abs_tol=SLACK),
    )
    for name in ("direction", "positions", "unit", "confidence"):
        own, other = str(getattr(said, name)), str(getattr(found, name))
        yield Check(part=name, said=own, found=other, holds=own == other)


def _code(said: CodeFacts, found: CodeFacts) -> Iterator[Check]:
    """Other code is worth knowing; other code under the same version and commit is wrong."""
    is_same_release = (said.autoquant, said.commit) == (found.autoquant, found.commit)
    yield Check(
        part="code",
        said=f"{said.autoquant} {said.commit or ''} {said.digest[:16]}",
        found=f"{found.autoquant} {found.commit or ''} {found.digest[:16]}",
        holds=said.digest == found.digest,
        is_note=not is_same_release,
    )
