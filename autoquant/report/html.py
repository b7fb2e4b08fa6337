"""The report of a run as one HTML file: no network, under a megabyte, on a phone and on paper."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import autoquant
from autoquant.errors import ConfigError
from autoquant.files import write_atomic
from autoquant.report import figures, maps, words
from autoquant.report.positions import positions
from autoquant.report.record import RunRecord
from autoquant.report.style import PALETTE, project_style, to_png, to_svg
from autoquant.store.run_directory import REPORT

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

PICTURES: Mapping[str, tuple[Callable[[RunRecord], "Figure"], str]] = {
    "frontier": (figures.frontier, "KL against bits per element, with baselines and budget"),
    "map": (maps.format_map, "Format and sensitivity of every layer group"),
    "sensitivity": (maps.sensitivity, "The most sensitive layer groups"),
    "prediction": (figures.prediction, "Measured KL against predicted KL"),
    "convergence": (figures.convergence, "KL of each trial and the best so far"),
    "positions": (positions, "KL by position in the sequence"),
    "tokens": (figures.tokens, "Distribution of KL over tokens"),
    "coverage": (maps.coverage, "Calibration tokens per expert"),
    "sizes": (maps.sizes, "Bytes by role and format"),
}
"""Name to what draws it, and what it shows in words."""


def write_report(record: RunRecord, out: Path | None = None) -> Path:
    """Write the report of a run, finished or not; the file written.

    Args:
        record: the run.
        out: file; by default `report.html` in the run directory, or beside the one that another
            version of AutoQuant wrote there.

    Raises:
        ConfigError: the file cannot be written.
    """
    own = REPORT if not record.other_schema else f"report-{autoquant.__version__}.html"
    target = out if out is not None else record.path / own
    text = render(record)
    with writing(target):
        write_atomic(target, text)
    return target


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Say which file or folder cannot be written, and what to do.

    Raises:
        ConfigError: it cannot; a full disk stays an OSError.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, FileExistsError, PermissionError) as error:
        raise ConfigError(
            f"{target} cannot be written: {error.strerror}.",
            fix="name a file in a folder that exists and is writable.",
        ) from error


def write_pngs(record: RunRecord, folder: Path) -> list[Path]:
    """Write each picture that the run has data for as `NAME.png`; the files written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in available(record):
        target = folder / f"{name}.png"
        target.write_bytes(to_png(draw(record, name)))
        written.append(target)
    return written


def draw(record: RunRecord, name: str) -> "Figure":
    """The picture `name` of a run; an empty frame where the run has no data for it."""
    with project_style():
        return PICTURES[name][0](record)


def available(record: RunRecord) -> list[str]:
    """Names of the pictures that the run has data for."""
    has_experts = bool((record.calibration or {}).get("expert_tokens"))
    there = {
        "frontier": bool(record.trials),
        "map": bool(record.groups) and bool(record.trials or record.probes),
        "sensitivity": bool(record.groups and record.probes),
        "prediction": bool(record.trials and record.probes),
        "convergence": bool(record.trials),
        "positions": bool((record.result or {}).get("by_position")),
        "tokens": record.tokens is not None,
        "coverage": has_experts,
        "sizes": record.best is not None and bool(record.groups),
    }
    return [name for name in PICTURES if there[name]]


def render(record: RunRecord) -> str:
    """The report as HTML text."""
    pictures = {}
    with project_style():
        for name in available(record):
            paint, label = PICTURES[name]
            pictures[name] = to_svg(paint(record), name, label)
    return template("report.html.j2").render(
        run=record,
        result=record.result,
        verdict=words.verdict(record),
        pictures=pictures,
        command=command_of(record),
        settings={k: v for k, v in record.settings.items() if k != "schema_version"},
        idle=_idle_experts(record),
        short=words.shortfalls(record.result) if record.result is not None else [],
        palette=PALETTE,
    )


@cache
def template(name: str) -> "Template":
    """A template of this package, with the number formats of `words` as filters."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("autoquant.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": words.size,
        "exact": words.exact,
        "number": words.number,
        "fixed": words.fixed,
        "percent": words.percent,
        "duration": words.duration,
    }
    environment.globals |= {
        "kl_range": words.kl_range,
        "budgeted": words.budgeted,
        "budget_note": words.budget_note,
        "further_limits": words.further_limits,
        "unit_of_budget": words.unit_of_budget,
        "counts_stored_bits": words.counts_stored_bits,
        "fit_terms": words.fit_terms,
        "fitted_codes": words.fitted_codes,
        "clipped_inputs": words.clipped_inputs,
        "polish": words.polish,
        "target_of": words.target_of,
        "how_probed": words.how_probed,
    }
    return environment.get_template(name)


def command_of(record: RunRecord) -> str:
    """The command line of the search; for a run that did not record it, one that goes on in it."""
    if record.result is not None and "command" in record.result:
        return str(record.result["command"])
    return f"autoquant search --config {record.path}/config.resolved.yaml --out {record.path}"


def _idle_experts(record: RunRecord) -> dict[str, int]:
    tokens: Mapping[str, Any] = (record.calibration or {}).get("expert_tokens", {})
    return {name: counts.count(0) for name, counts in tokens.items() if 0 in counts}
