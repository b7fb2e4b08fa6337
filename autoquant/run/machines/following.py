"""What the ranks of a command do together before they measure, and how all but one follow."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autoquant.environment import measuring_on, package_versions
from autoquant.errors import ConfigError, SourceError
from autoquant.measure.ranks.ranks import Ranks
from autoquant.measure.ranks.together import announce_step, follow
from autoquant.measure.scorer import Scorer
from autoquant.model.loading import choose_device
from autoquant.plan.plan import Plan
from autoquant.progress import Silent
from autoquant.run.config import ProbeConfig
from autoquant.run.opening import open_plan
from autoquant.run.sensitivity.probing import LOAD, open_to_probe
from autoquant.source.source import Source
from autoquant.store.run_directory import read_identity

_OPEN = "open"

_OF_ONE_PROCESS = frozenset(
    {"model", "out", "calibration", "device", "device_memory", "host_memory", "mlflow"}
)
"""Settings that name places, which may have another name on another machine, or that the leader
alone goes by."""

_SAMPLES, _SAMPLE_BYTES = 64, 4096
"""Pieces of a weight file that ranks compare, and their size."""


def open_plan_on_all(config: ProbeConfig, ranks: Ranks) -> Plan:
    """The plan of a configuration, which the followers open too; called by the leader.

    Raises:
        ConfigError: ranks have other settings, files, versions or devices; or as `open_plan` does.
        SourceError: the model of some rank is missing, damaged or not understood.
    """
    announce_step(ranks, _OPEN)
    return _open(config, ranks)


def follow_run(config: ProbeConfig, ranks: Ranks) -> Any:
    """Help the leader to measure; what came of it.

    Raises:
        RankLost: another process has ended.
        Exception: what ended the leader, or this process.
    """
    plans: list[Plan] = []

    def load(run: str, signature: Mapping[str, Any]) -> Scorer:
        folder = Path(run) if _is_here(Path(run), signature) else Path(own)
        return ranks.own(lambda: open_to_probe(config, plans[-1], folder, Silent(), ranks)).scorer

    with TemporaryDirectory(prefix="autoquant-") as own:
        return follow(ranks, {_OPEN: lambda: plans.append(_open(config, ranks)), LOAD: load})


def _is_here(run: Path, signature: Mapping[str, Any]) -> bool:
    """Whether this machine sees the leader's run directory."""
    try:
        identity = read_identity(run)
    except SourceError:
        return False
    return identity is not None and identity["signature"] == signature


def _open(config: ProbeConfig, ranks: Ranks) -> Plan:
    plan = ranks.own(lambda: open_plan(config))
    if ranks.size > 1:
        _require_same(ranks, config, plan.source)
    return plan


def _require_same(ranks: Ranks, config: ProbeConfig, source: Source) -> None:
    found = ranks.all_of(
        lambda: {
            "settings": [*_settings(config)],
            "files of the model": outline(source),
            "installed versions": package_versions(),
            "device": measuring_on(choose_device(config.device)),
        }
    )
    ranks.own(lambda: _require_equal(found))


def _require_equal(found: Sequence[Mapping[str, Any]]) -> None:
    for number, own in enumerate(found):
        for name, value in own.items():
            if value != found[0][name]:
                raise ConfigError(
                    f"process {number} has other {name} than process 0: "
                    f"{_difference(found[0][name], value)}. Their measurements cannot be put "
                    "together.",
                    fix="give every process the same command, files, installation and kind of "
                    "device.",
                )


def _settings(config: ProbeConfig) -> Iterator[tuple[str, str]]:
    for name, value in config.saved().items():
        if name not in _OF_ONE_PROCESS:
            yield name, str(value)


def outline(source: Source) -> list[tuple[str, str]]:
    """What a checkpoint holds, and digests of pieces of its files; `Source.digest` reads all."""
    headers = sorted((t.name, t.dtype, list(t.shape)) for t in source.headers)
    parts = [("config.json", _digest(source.config)), ("headers", _digest(headers))]
    return parts + [(file.name, _sampled(file)) for file in source.headers.files]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _sampled(path: Path) -> str:
    """Digest of a file's size and of pieces all over it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for piece in range(_SAMPLES):
            file.seek(piece * max(0, size - _SAMPLE_BYTES) // max(1, _SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _difference(one: Any, other: Any) -> str:
    """The first entry in which two descriptions differ."""
    pairs = dict(one), dict(other)
    differing = (n for n in {**pairs[0], **pairs[1]} if pairs[0].get(n) != pairs[1].get(n))
    name = next(differing, "their order")
    return f"{name} is {pairs[1].get(name)} there and {pairs[0].get(name)} here"
