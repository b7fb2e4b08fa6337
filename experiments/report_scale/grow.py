"""A run directory of a large model and a long search, made out of the records of a small one."""

import json
from pathlib import Path
from typing import Any

from autoquant.search.trials import Trial
from autoquant.store.run_directory import RunDirectory
from autoquant.study.journal import StudyLog, read_trials
from autoquant.study.record import Sequences, StudyForm
from autoquant.study.space import StudySpace

MOST_SEQUENCES = 10_000
"""Of the search tokens of the small run; a document each."""

SPREAD = 0.5
"""How far the last round of repeated trials is above the first, so that no two marks coincide."""


def grow(run: Path, *, layers: int, groups: int, trials: int) -> None:
    """Repeat the first layer's groups in every layer, and the trials under new numbers.

    Args:
        run: a finished run directory; its files are rewritten.
        layers: of the large model.
        groups: of the large model, spread evenly over its layers.
        trials: of the long search.
    """
    plan = json.loads((run / "groups.json").read_text())
    sensitivity = json.loads((run / "sensitivity.json").read_text())
    records = [trial.to_dict() for trial in read_trials(run)]
    first = [group for group in plan["groups"] if group["layer"] == 0]
    names = {group["name"] for group in first}
    copies = [
        (layer, copy) for layer in range(layers) for copy in range(groups // layers // len(first))
    ]

    def at(name: str, layer: int, copy: int) -> str:
        return f"{name.replace('layers.0.', f'layers.{layer}.')}{copy or ''}"

    plan["groups"] = [
        group | {"name": at(group["name"], *copy), "layer": copy[0]}
        for copy in copies
        for group in first
    ]
    sensitivity["probes"] = [
        probe | {"group": at(probe["group"], *copy), "kl": probe["kl"] / (1 + copy[0])}
        for probe in sensitivity["probes"]
        if probe["group"] in names
        for copy in copies
    ]
    lines = []
    for number in range(trials):
        record = records[number % len(records)]
        chosen = {n: c for n, c in record["groups"].items() if n in names}
        everywhere = {at(n, *copy): c for copy in copies for n, c in chosen.items()}
        above = SPREAD * (number // len(records)) * len(records) / trials
        lines.append(
            record | {"number": number, "kl": record["kl"] * (1 + above), "groups": everywhere}
        )
    _write(run / "groups.json", plan)
    _write(run / "sensitivity.json", sensitivity)
    _write_study(run, plan, [Trial.from_dict(line) for line in lines])


def _write_study(run: Path, plan: dict[str, Any], trials: list[Trial]) -> None:
    space = {group["name"]: list(group["choices"]) for group in plan["groups"]}
    (run / "study.log").unlink(missing_ok=True)
    with RunDirectory.open(run, json.loads((run / "run.json").read_text())["signature"]) as held:
        sequences = Sequences(document=tuple(range(MOST_SEQUENCES)), tokens=(1,) * MOST_SEQUENCES)
        form = StudyForm(space=StudySpace.from_dict(space), limits=(), sequences=sequences)
        log = StudyLog.open(held, "large", form)
        for trial in trials:
            log.add(trial)


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))
